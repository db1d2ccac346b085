"""What chips compute at most, as their vendors state it."""

# bfloat16 FLOP/s by `jax.Device.device_kind`; sources: launch/hardware.py.
PEAK_FLOPS = {
  'NVIDIA H100 80GB HBM3': 989.4e12,
  'NVIDIA H200': 989.4e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
}
