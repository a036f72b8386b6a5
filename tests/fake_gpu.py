"""A GPU that is not there: tensors that say cuda:0 and compute on the CPU; streams, events and page-locked memory that
are only kept account of.

    with FakeGpu(monkeypatch) as gpu:
        x = gpu.tensor(values)      computes as `values` does, but is on cuda:0
        gpu.waits                   what made a thread wait for the GPU, one line each
        gpu.locked                  address -> bytes of page-locked memory

Operations run when they are called. What a GPU may do is another order: each stream runs its own operations in theirs,
and of two streams nothing is known but what events say. So each operation carries a vector clock (how far every stream has
come for certain when it runs), and two operations that touch one place in memory, one of them writing, must be ordered
by these clocks. `RaceError` names the first two that are not. Places are the slots that `watch` was given, and RAM that
copies to the GPU read.
"""

import contextlib
import threading
from collections import defaultdict

import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
# Their result depends on values, so that the host must have them.
WAITING = {
    "tolist",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "unique",
    "nonzero",
    "bincount",
    "equal",
}


class RaceError(AssertionError):
    """Two operations on one place in memory that nothing orders."""


class Far(torch.Tensor):
    """A tensor on the fake GPU. Its values are in RAM."""

    gpu: "FakeGpu"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return cls.gpu.call(func, args, kwargs or {})


class Event:
    def __init__(self, enable_timing=False, blocking=False):
        self.clock = None

    def record(self, stream):
        with Far.gpu.lock:
            self.clock = dict(stream.clock)

    def query(self):
        return False  # a GPU may be that slow

    def synchronize(self):
        with Far.gpu.lock:
            join(Far.gpu.host(), self.clock)


class Stream:
    def __init__(self, device=None):
        self.clock = {self: 0}

    def record_event(self):
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event):
        assert event.clock is not None, "an event that was not recorded orders nothing"
        with Far.gpu.lock:
            join(self.clock, event.clock)

    def synchronize(self):
        with Far.gpu.lock:
            join(Far.gpu.done, self.clock)


def join(clock, other):
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


class Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return Far.gpu.call(func, args, kwargs or {})


class FakeGpu:
    def __init__(self, monkeypatch):
        self.lock = threading.RLock()
        self.threads = threading.local()
        self.stream = Stream()
        self.waits, self.errors, self.recorded, self.devices = [], [], [], []
        self.done = {}  # how far a stream has come for certain, whoever looks
        self.locked = {}
        self.kept = []  # small page-locked tensors
        self.places = set()
        self.reads, self.writes = defaultdict(list), {}  # place -> (stream, number, what)
        self.refuses = 0  # the error code of registrations
        Far.gpu = self
        for name, stand_in in {
            "Stream": Stream,
            "Event": Event,
            "stream": self.use_stream,
            "current_stream": lambda device=None: self.current(),
            "device": lambda device: contextlib.nullcontext(),
            "set_device": self.devices.append,
            "synchronize": lambda device=None: self.waits.append("synchronize"),
            "cudart": lambda: self,
            "mem_get_info": lambda device=None: (2**40, 2**40),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self.recorded.append((tensor, stream))
        )
        self.mode = Calls()

    def __enter__(self):
        self.mode.__enter__()
        return self

    def __exit__(self, *problem):
        self.mode.__exit__(*problem)

    # ------------------------------------------------------------------------------------------ streams, memory

    @contextlib.contextmanager
    def use_stream(self, stream):
        before = self.current()
        self.threads.stream = stream
        try:
            yield
        finally:
            self.threads.stream = before

    def current(self):
        return getattr(self.threads, "stream", self.stream)

    def host(self):
        """What this thread knows to be done."""
        if not hasattr(self.threads, "host"):
            self.threads.host = {}
        return self.threads.host

    def cudaHostRegister(self, address, size, flags):
        if not self.refuses:
            self.locked[address] = size
        return self.refuses

    def cudaHostUnregister(self, address):
        return 0 if self.locked.pop(address, None) is not None else 1

    def is_locked(self, tensor):
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        small = [(kept.data_ptr(), kept.nbytes) for kept in self.kept]
        return any(at <= begin and end <= at + size for at, size in (*self.locked.items(), *small))

    def pin(self, tensor):
        with torch._C.DisableTorchFunction():
            self.kept.append(tensor.clone())
        return self.kept[-1]

    def tensor(self, values):
        with torch._C.DisableTorchFunction():
            return values.clone().as_subclass(Far)

    def values(self, tensor):
        """Without a wait, for a test."""
        with torch._C.DisableTorchFunction():
            return tensor.as_subclass(torch.Tensor)

    # --------------------------------------------------------------------------------------------------- order

    def watch(self, cache):
        """The slots of a SlotCache become places."""
        for stack in cache.stacks.values():
            self.places.update(slot.data_ptr() for slot in self.values(stack))

    def run(self, what, reads=(), writes=()):
        """An operation on the current stream."""
        with self.lock:
            stream = self.current()
            stream.clock[stream] += 1
            mine = stream, stream.clock[stream], what
            for place in reads:
                if place in self.writes:
                    self.check(self.writes[place], stream.clock, f"{what} reads what", "writes")
                self.reads[place].append(mine)
            for place in writes:
                earlier = [*self.reads[place], *filter(None, [self.writes.get(place)])]
                for other in earlier:
                    self.check(other, stream.clock, f"{what} writes what", "uses")
                self.reads[place], self.writes[place] = [], mine

    def write_by_host(self, address):
        """A thread writes RAM: copies out of it must be done, as far as this thread knows."""
        with self.lock:
            known = dict(self.done)
            join(known, self.host())
            for other in self.reads[address]:
                self.check(other, known, "a thread writes what", "reads")
            self.reads[address] = []

    def check(self, other, clock, ours, theirs):
        stream, number, what = other
        if clock.get(stream, 0) < number:
            self.errors.append(f"{ours} {what} {theirs}, and nothing orders the two")
            raise RaceError(self.errors[-1])

    def wait(self, why):
        with self.lock:
            self.waits.append(why)
            join(self.host(), self.current().clock)

    # --------------------------------------------------------------------------------------------------- calls

    def call(self, func, args, kwargs):
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        with torch._C.DisableTorchFunction():
            far = [item for item in tree_tensors(args, kwargs) if isinstance(item, Far)]
            if far and name in ("device", "is_cuda", "is_cpu"):
                return {"device": DEVICE, "is_cuda": True, "is_cpu": False}[name]
            if name in ("to", "cpu"):
                return self.to(args[0], name, args[1:], kwargs)
            if name == "copy_":
                return self.copy(*args, **kwargs)
            made = not far and torch.device(kwargs.get("device") or "cpu").type == "cuda"
            if not far and not made:
                return func(*args, **kwargs)
            near = [t for t in tree_tensors(args, kwargs) if not isinstance(t, Far) and t.dim()]
            assert made or not near, f"{name} of tensors on cuda:0 and on the CPU"
            if name in WAITING:
                self.wait(name)
            if not name.startswith("_") and far:
                self.run(name, reads=[t.data_ptr() for t in far if t.data_ptr() in self.places])
            if made or "device" in kwargs:
                kwargs = {**kwargs, "device": "cpu"}
            result = func(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})
            return wrap(result)

    def to(self, tensor, name, args, kwargs):
        target = next((a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))), None)
        target = "cpu" if name == "cpu" else None if target is None else torch.device(target).type
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
        dtypes = [item for item in args if isinstance(item, torch.dtype)]
        if isinstance(tensor, Far) and target == "cpu":
            self.wait(name)
            return tensor.as_subclass(torch.Tensor).clone()
        if not isinstance(tensor, Far) and target == "cuda":
            if not self.is_locked(tensor):
                self.wait("copy from memory that is not page-locked")
            return tensor.clone().as_subclass(Far)
        changed = tensor.as_subclass(torch.Tensor).to(*dtypes, **kwargs) if dtypes or kwargs else tensor
        return changed.as_subclass(Far) if isinstance(tensor, Far) and changed is not tensor else changed

    def copy(self, to, source, non_blocking=False):
        if (
            isinstance(to, Far)
            and not isinstance(source, Far)
            and not (non_blocking and self.is_locked(source))
        ):
            self.wait("copy that blocks, or from memory that is not page-locked")
        if isinstance(to, Far):
            writes = [place for place in [to.data_ptr()] if place in self.places]
            self.run("copy_", reads=[source.data_ptr()], writes=writes)
        to.as_subclass(torch.Tensor).copy_(source.as_subclass(torch.Tensor))
        return to


def tree_tensors(args, kwargs):
    return [
        item for item in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)
    ]


def plain(tree):
    return torch.utils._pytree.tree_map(
        lambda item: item.as_subclass(torch.Tensor) if isinstance(item, Far) else item, tree
    )


def wrap(tree):
    return torch.utils._pytree.tree_map(
        lambda item: item.as_subclass(Far) if type(item) is torch.Tensor else item, tree
    )
