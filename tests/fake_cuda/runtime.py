"""Runtime: what `torch.cuda` and a few functions of torch say in a process that has the stand-in's devices."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _device

from fake_cuda import distributed, kernels
from fake_cuda.counters import COUNT
from fake_cuda.dispatch import Mode
from fake_cuda.library import load
from fake_cuda.tensor import full_device, is_cuda, on_cuda

MEMORY = 139 * 2**30
_said = threading.local()
"""`device`: what a thread has set as its own."""


class Properties:
    """Of one device."""

    name, total_memory, multi_processor_count = "Stand-in for CUDA", MEMORY, 132

    def __init__(self, index: int) -> None:
        self.major, self.minor = divmod(COUNT.arch, 10)
        self.uuid = f"stand-in-{distributed.first_gpu() + index}"


class Event:
    """One stream does all work in order, and all but collectives at once: an event has happened when those before it have."""

    def __init__(self, *args: Any, enable_timing: bool = False, **kwargs: Any) -> None:
        self._before: tuple[Any, ...] = ()
        self._timing = enable_timing

    def record(self, stream: Any = None) -> None:
        self._before = distributed.unfinished()

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        if threading.current_thread() is not threading.main_thread() and not hasattr(_said, "device"):
            COUNT.refuse("cudaEventQuery in a thread that is on no device yet: it would make a context on GPU 0")
        return all(work.is_completed() for work in self._before)

    def synchronize(self) -> None:
        _synchronize()

    def elapsed_time(self, end: Any) -> float:
        if not (self._timing and end._timing):
            COUNT.refuse("cudaEventElapsedTime of events that were made without timing")
        if not (self.query() and end.query()):
            COUNT.refuse("cudaEventElapsedTime of events that have not happened")
        return 125.0


class Stream:
    """Another stream: its work runs in the order in which it is given, as if streams waited for each other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _synchronize()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...


def _synchronize(device: Any = None) -> None:
    distributed.raise_late()
    COUNT.wait("synchronize")


def _index(device: Any = None) -> int:
    if device is None:
        return int(load().fake_cuda_current())
    found = full_device(f"cuda:{device}" if isinstance(device, int) else device)
    return 0 if found is None else found.index


def _set_device(device: Any) -> None:
    _said.device = _index(device)
    load().fake_cuda_set_current(_said.device)


def _made(real: Any) -> Any:
    """`torch.tensor` and its like move to a device by themselves, without dispatching anything."""

    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if not is_cuda(device):
            return real(data, *args, device=device, **kwargs)
        return (data if on_cuda(data) else real(data, *args, **kwargs)).to(device)

    return make


def _device_functions(devices: int) -> dict[str, Any]:
    """What is asked of one device, or of all."""
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: devices,
        "current_device": _index,
        "set_device": _set_device,
        "synchronize": _synchronize,
        "get_device_name": lambda device=None: Properties.name,
        "get_device_properties": lambda device=None: Properties(_index(device)),
        "get_device_capability": lambda device=None: divmod(COUNT.arch, 10),
        "is_bf16_supported": lambda *args, **kwargs: COUNT.arch >= 80,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: stream,
    }


def _memory_functions() -> dict[str, Any]:
    return {
        "max_memory_allocated": lambda device=None: COUNT.peak,
        "memory_allocated": lambda device=None: COUNT.now,
        "max_memory_reserved": lambda device=None: COUNT.peak,
        "memory_reserved": lambda device=None: COUNT.now,
        "reset_peak_memory_stats": lambda device=None: COUNT.reset_peak(),
        "mem_get_info": lambda device=None: (MEMORY - COUNT.now, MEMORY),
        "empty_cache": lambda: None,
        "_lazy_init": lambda: None,
    }


def enable(devices: int) -> None:
    """From here on this process has CUDA devices."""
    load().fake_cuda_set_visible(devices)
    for name, function in (_device_functions(devices) | _memory_functions()).items():
        setattr(torch.cuda, name, function)
    _device._device_constructors()  # `with torch.device(...)` knows these functions by what they are now
    torch.nn.functional.scaled_dot_product_attention = kernels.attention
    torch.tensor, torch.as_tensor = _made(torch.tensor), _made(torch.as_tensor)
    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group = distributed.init_process_group, distributed.new_group
    dist.get_backend = distributed.get_backend
    dist.is_nccl_available = lambda: True
    torch.cuda.nccl.version = lambda: (2, 27, 0)
    dist.Work.wait = distributed.wait
    # `Module.to` puts other objects in place of parameters: there is no data that could be exchanged in the same ones.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    Mode().__enter__()
