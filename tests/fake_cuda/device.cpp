// What autograd and the dispatcher ask of a CUDA runtime, answered without one, for a CPU-only build of torch. Tensors "on" a
// device are wrapper subclasses (tensor.py); nothing here ever runs a kernel. One stream per device.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

DeviceIndex visible = 1;
thread_local DeviceIndex current = 0;

DeviceIndex exchange(DeviceIndex index) {
  const DeviceIndex before = current;
  if (index >= 0) current = index;
  return before;
}

// Autograd keeps one thread for each device, and chooses it by the device of a node's gradient.
struct Guard final : public c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device on(DeviceIndex index) { return Device(DeviceType::CUDA, index); }
  Device exchangeDevice(Device device) const override { return on(exchange(device.index())); }
  Device getDevice() const override { return on(current); }
  void setDevice(Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { exchange(device.index()); }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return Stream(Stream::DEFAULT, stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return visible; }
};

}  // namespace

namespace at {

struct FakeCUDAHooks final : public CUDAHooksInterface {
  explicit FakeCUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex deviceCount() const override { return visible; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { exchange(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange(index); }
  void deviceSynchronize(DeviceIndex) const override {}
};

C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeCUDAHooks)

}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

extern "C" {
void fake_cuda_set_visible(int count) { visible = static_cast<DeviceIndex>(count); }
void fake_cuda_set_current(int index) { exchange(static_cast<DeviceIndex>(index)); }
int fake_cuda_current() { return current; }
}
