/* The functions of NVIDIA's driver by which lora_fx.onnx.cuda_device asks for the device's name. */
#include <string.h>

int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, "placement only", size);
  return 0;
}
