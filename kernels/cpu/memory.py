"""Arguments of operations: records of addresses that compiled code reads, and arrays seen through addresses.

An operation that a team of threads runs is called with two addresses, whatever it does; what it works on is described by a
record (a NumPy structured array) that is filled once, when a program is built. Arrays are seen through pointers: they count no
references, and nothing checks an index or takes a negative one for one from the end.
"""

import contextlib
import ctypes
import mmap

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.extending import intrinsic

LINE, HUGE_PAGE, SLAB = 64, 2 << 20, 64 << 20


def record(*names: str) -> np.dtype:
    """The dtype of a record of 64-bit integers: addresses, sizes, strides in elements."""
    return np.dtype([(name, "i8") for name in names])


def address(array: np.ndarray | None) -> int:
    """Where an array's first element lies; 0 for None."""
    return 0 if array is None else array.__array_interface__["data"][0]


def aligned(shape, dtype, fill=None) -> np.ndarray:
    """An array that starts at a multiple of 64 bytes; without ``fill`` zeros, which take no memory before they are written to."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    array = _slab.take(size).view(dtype).reshape(shape)
    if fill is not None:
        array[...] = fill
    return array


class _Slab:
    """Memory that the system is asked to back with huge pages: arrays that are used one after the other lie one behind the other.

    Reading weights at the speed of memory needs few entries of the address translation's caches. Room is never given out
    again; a slab is freed with the last of its arrays.
    """

    def __init__(self):
        self._bytes, self._used = np.empty(0, np.uint8), 0

    def take(self, size: int) -> np.ndarray:
        """uint8 [size] at a multiple of 64 bytes."""
        first = -(-self._used // LINE) * LINE
        if first + size > self._bytes.size:
            self._bytes, first = self._fresh(max(size, SLAB)), 0
        self._used = first + size
        return self._bytes[first : first + size]

    @staticmethod
    def _fresh(size: int) -> np.ndarray:
        """uint8 [size], zeros that take no memory before they are touched, from the start of a huge page on."""
        pages = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A kernel without huge pages refuses.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(pages, np.uint8)
        start = -address(raw) % HUGE_PAGE
        return raw[start : start + size]


_slab = _Slab()
_FREE, _DONTNEED = 8, 4         # of madvise(2)


def give_back(array: np.ndarray) -> None:
    """Returns a contiguous array's memory to the system, whole pages of it; they hold zeros, and take memory again once they are
    written to.

    Without the first call parts of huge pages would stay with the process until the system is in need: the call splits these, in
    about 0.3 ms each.
    """
    start = -(-address(array) // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address(array) + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        for advice in (_FREE, _DONTNEED):
            _madvise(start, stop - start, advice)


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def _view(element):
    pointer = types.CPointer(element)
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))
    return pointer(types.intp), codegen


@intrinsic
def float32_at(typing_context, where):
    """A pointer to float32 at an address, for the loads and stores of ``simd``."""
    return _view(types.float32)


@intrinsic
def int8_at(typing_context, where):
    """A pointer to int8 at an address, for the loads and stores of ``simd``."""
    return _view(types.int8)


@intrinsic
def uint8_at(typing_context, where):
    """A pointer to uint8 at an address."""
    return _view(types.uint8)


@intrinsic
def uint16_at(typing_context, where):
    """A pointer to uint16 at an address, for the loads and stores of ``simd``."""
    return _view(types.uint16)


@intrinsic
def int32_at(typing_context, where):
    """A pointer to int32 at an address, for the loads and stores of ``simd``."""
    return _view(types.int32)


@intrinsic
def int64_at(typing_context, where):
    """A pointer to int64 at an address, for the loads and stores of ``simd``."""
    return _view(types.int64)


@intrinsic
def float64_at(typing_context, where):
    """A pointer to float64 at an address."""
    return _view(types.float64)


def record_pointer(dtype: np.dtype):
    """For an intrinsic's body: an integer becomes a pointer to records of this dtype."""
    return _view(from_dtype(dtype))


@intrinsic
def atomic_add(typing_context, where, value):
    """Adds to the int64 at an address, sequentially consistent; returns what was there."""
    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")
    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_or(typing_context, where, value):
    """Ors into the int64 at an address; returns what was there."""
    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("or", pointer, arguments[1], "seq_cst")
    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_swap(typing_context, where, value):
    """Stores into the int64 at an address; returns what was there."""
    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("xchg", pointer, arguments[1], "seq_cst")
    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing_context, where):
    """The int64 at an address."""
    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)
    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(typing_context, where, value):
    """Stores into the int64 at an address."""
    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], pointer, "seq_cst", 8)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_replace(typing_context, where, expected, value):
    """Stores into the int64 at an address if it holds ``expected``; returns whether it did."""
    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        result = builder.cmpxchg(pointer, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)
    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def call(typing_context, function, member, arguments):
    """Calls the C function at an address with two integers."""
    def codegen(context, builder, signature, values):
        word = ir.IntType(64)
        pointer = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [word, word]).as_pointer())
        builder.call(pointer, values[1:])
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, types.intp), codegen
