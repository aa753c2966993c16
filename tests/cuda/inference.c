/* The functions of TensorRT that its provider calls when it is loaded, so that the runtime can list
   the kernels of all its providers. Each gives an object whose methods do nothing. */
#define METHODS 64
static void *nothing(void) { return 0; }
static void *methods[METHODS];
static void *object = methods;

static void *any_object(void) {
  for (int i = 0; i < METHODS; i++) methods[i] = (void *)nothing;
  return &object;
}
void *createInferBuilder_INTERNAL() { return any_object(); }
void *createInferRefitter_INTERNAL() { return any_object(); }
void *createInferRuntime_INTERNAL() { return any_object(); }
void *getPluginRegistry() { return any_object(); }
int getInferLibVersion() { return 101000; }
