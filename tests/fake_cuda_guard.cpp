// Lets a CPU build of torch hold fake tensors on cuda:0 and cuda:1, which have no memory: autograd and dispatch ask the
// device's guard for the current device and stream, and a build without CUDA has none. See fake_cuda.py.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

class NoDevice final : public c10::impl::DeviceGuardImplInterface {
 public:
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  c10::DeviceType type() const override { return static_type; }
  Device getDevice() const override { return Device(static_type, current_); }
  void setDevice(Device device) const override { current_ = device.has_index() ? device.index() : DeviceIndex(0); }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 2; }

 private:
  mutable DeviceIndex current_ = 0;
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoDevice)
}
