// An NVML of eight GPUs that says what a script says: the file `script` beside this library, read at every call.
//
// A line is `GPU.KEY VALUE`. A key that is not there gives the default below, the value `-` NVML_ERROR_NOT_SUPPORTED;
// `GPU.process PID BYTES` may stand several times; `GPU.energy_per_call` is added at every reading of the counter.
// Init, shutdown and readings (the utilisation of a GPU) are logged to the file `log` beside it.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7;
constexpr unsigned GPUS = 8;

std::string beside(const char* name) {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&beside), &info);
  std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1) + name;
}

std::vector<std::string> values(unsigned gpu, const char* key) {
  std::vector<std::string> found;
  std::string wanted = std::to_string(gpu) + "." + key + " ";
  if (FILE* file = std::fopen(beside("script").c_str(), "r")) {
    char line[512];
    while (std::fgets(line, sizeof line, file)) {
      std::string text = line;
      if (text.rfind(wanted, 0) == 0) found.push_back(text.substr(wanted.size(), text.find('\n') - wanted.size()));
    }
    std::fclose(file);
  }
  return found;
}

void log_line(const std::string& line) {
  if (FILE* file = std::fopen(beside("log").c_str(), "a")) {
    std::fprintf(file, "%s\n", line.c_str());
    std::fclose(file);
  }
}

unsigned number_of(void* device) { return static_cast<unsigned>(reinterpret_cast<size_t>(device)) - 1; }

template <class T>
int number(void* device, const char* key, unsigned long long otherwise, T* out) {
  auto found = values(number_of(device), key);
  if (!found.empty() && found[0] == "-") return NOT_SUPPORTED;
  *out = static_cast<T>(found.empty() ? otherwise : std::stoull(found[0]));
  return SUCCESS;
}

int text(void* device, const char* key, const std::string& otherwise, char* out, unsigned length) {
  auto found = values(number_of(device), key);
  std::snprintf(out, length, "%s", found.empty() ? otherwise.c_str() : found[0].c_str());
  return SUCCESS;
}

struct Memory { unsigned version; unsigned long long total, reserved, free, used; };
struct Utilization { unsigned gpu, memory; };
struct Process { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };
struct Pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };

}  // namespace

extern "C" {

int nvmlInit_v2() { log_line("init"); return SUCCESS; }
int nvmlShutdown() { log_line("shutdown"); return SUCCESS; }

int nvmlSystemGetDriverVersion(char* out, unsigned length) { std::snprintf(out, length, "580.95.05"); return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int* out) { *out = 13000; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned* out) { *out = GPUS; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** out) {
  if (index >= GPUS) return INVALID_ARGUMENT;
  *out = reinterpret_cast<void*>(static_cast<size_t>(index) + 1);
  return SUCCESS;
}

int nvmlDeviceGetName(void* device, char* out, unsigned length) { return text(device, "name", "Fake A100", out, length); }
int nvmlDeviceGetUUID(void* device, char* out, unsigned length) {
  return text(device, "uuid", "GPU-0000000" + std::to_string(number_of(device)), out, length);
}
int nvmlDeviceGetPciInfo_v3(void* device, Pci* out) {
  std::memset(out, 0, sizeof *out);
  out->bus = 0x10 * (number_of(device) + 1);
  std::snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus);
  return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void*, int* major, int* minor) { *major = 8, *minor = 0; return SUCCESS; }

int nvmlDeviceGetUtilizationRates(void* device, Utilization* out) {
  log_line("reading " + std::to_string(number_of(device)));
  int status = number(device, "utilization", 50, &out->gpu);
  return status ? status : number(device, "memory_utilization", 25, &out->memory);
}
int nvmlDeviceGetMemoryInfo_v2(void* device, Memory* out) {
  out->total = 80ull << 30, out->reserved = 0;
  int status = number(device, "memory_used", 10ull << 30, &out->used);
  out->free = out->total - out->used;
  return status;
}
int nvmlDeviceGetPowerUsage(void* device, unsigned* out) { return number(device, "power", 200000, out); }
int nvmlDeviceGetPowerManagementLimit(void* device, unsigned* out) { return number(device, "limit", 400000, out); }
int nvmlDeviceGetTemperature(void* device, int, unsigned* out) { return number(device, "temperature", 60, out); }
int nvmlDeviceGetClockInfo(void* device, int type, unsigned* out) {
  if (type != 1 && type != 2) return INVALID_ARGUMENT;
  return type == 1 ? number(device, "sm_clock", 1410, out) : number(device, "memory_clock", 1215, out);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void* device, unsigned long long* out) {
  return number(device, "throttle", 0, out);
}
int nvmlDeviceGetTotalEccErrors(void* device, int type, int counter, unsigned long long* out) {
  if (counter != 0) return INVALID_ARGUMENT;  // volatile
  return type == 0 ? number(device, "ecc_corrected", 0, out) : number(device, "ecc_uncorrected", 0, out);
}
int nvmlDeviceGetTotalEnergyConsumption(void* device, unsigned long long* out) {
  static unsigned long long calls = 0;
  unsigned long long each = 0;
  number(device, "energy_per_call", 0, &each);
  int status = number(device, "energy", 1000000, out);
  *out += each * calls++;
  return status;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned* count, Process* out) {
  auto found = values(number_of(device), "process");
  unsigned room = *count;
  *count = static_cast<unsigned>(found.size());
  if (found.empty()) return SUCCESS;
  if (!out || room < found.size()) return INSUFFICIENT_SIZE;
  for (size_t i = 0; i < found.size(); ++i) {
    out[i] = Process{0, 0, 0xffffffffu, 0xffffffffu};
    std::sscanf(found[i].c_str(), "%u %llu", &out[i].pid, &out[i].bytes);
  }
  return SUCCESS;
}

}  // extern "C"
