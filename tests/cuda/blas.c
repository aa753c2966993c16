/* The functions of cuBLAS from which ONNX Runtime's CUDA provider reads a result. */
static int any_handle;

int cublasCreate_v2(void **handle) { *handle = &any_handle; return 0; }
int cublasLtCreate(void **handle) { *handle = &any_handle; return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
const char *cublasGetStatusName(int status) { return "none"; }
const char *cublasGetStatusString(int status) { return "none"; }
