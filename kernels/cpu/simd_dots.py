"""Dot products of four unsigned bytes with four signed ones in each of sixteen lanes, as the instruction set does them best.

They are exact on every target. A ``Dots`` works on as many lanes as a register has: ``parts`` of them make up the sixteen.
"""

from llvmlite import ir

from . import target
from .simd import _I8, _I16, _I32, _declare

BYTES = 64
_VB = ir.VectorType(_I8, BYTES)


def _lanes(*limits):
    """A mask of lane numbers: those of range(*limits)."""
    numbers = list(range(*limits))
    return ir.Constant(ir.VectorType(_I32, len(numbers)), numbers)


def _vectors(builder, value, llvm_vector, parts):
    """``value`` cut into ``parts`` equal vectors."""
    if parts == 1:
        return [value]
    lanes = llvm_vector.count // parts
    undefined = ir.Constant(llvm_vector, ir.Undefined)
    return [builder.shuffle_vector(value, undefined, _lanes(p * lanes, (p + 1) * lanes))
            for p in range(parts)]


def _joined(builder, parts):
    """The inverse of ``_vectors``: a power of two of vectors as one."""
    while len(parts) > 1:
        lanes = parts[0].type.count
        parts = [builder.shuffle_vector(a, b, _lanes(0, 2 * lanes)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _all(llvm_vector, value):
    return ir.Constant(llvm_vector, [value] * llvm_vector.count)


class Dots:
    """What the instruction sets share; each adds ``step``, a group's sum with one more dot product.

    ``signed``: weights count as what they are less 128, not as what is stored.
    """

    signed = False

    def __init__(self, bits: int):
        self.bits, self.parts = bits, 512 // bits
        self.bytes, self.words, self.lanes = (ir.VectorType(t, bits // t.width) for t in (_I8, _I16, _I32))

    def _call(self, builder, name, result, *arguments):
        return builder.call(_declare(builder, name, result, [argument.type for argument in arguments]), arguments)

    def weights(self, builder, stored):
        """What the dot products of several tokens with the same bytes share."""
        return stored

    def activations(self, builder, four):
        """What those of several rows with the same four bytes, an int32, share."""
        undefined = ir.Constant(self.lanes, ir.Undefined)
        first = builder.insert_element(undefined, four, ir.Constant(_I32, 0))
        return builder.bitcast(builder.shuffle_vector(first, undefined, _all(self.lanes, 0)), self.bytes)

    def start(self, builder, counts):
        """The sum of a group, from the counts that it is to be added to."""
        return counts

    def finish(self, builder, counts, total):
        """The counts with a group's sum."""
        return total


class FourProducts(Dots):
    """One instruction (VNNI)."""

    def step(self, builder, total, weights, activations):
        # With operands of int32 every LLVM understands the name; later ones mean bytes by it.
        arguments = total, builder.bitcast(weights, self.lanes), builder.bitcast(activations, self.lanes)
        return self._call(builder, f"llvm.x86.avx512.vpdpbusd.{self.bits}", self.lanes, *arguments)


class _Pairs(Dots):
    """x86 from AVX2 on: one instruction multiplies bytes and adds two neighbouring products, saturating at 16 bits."""

    def _bytes_times_bytes(self, builder, unsigned, signed):
        name = "llvm.x86.avx512.pmaddubs.w.512" if self.bits == 512 else "llvm.x86.avx2.pmadd.ub.sw"
        return self._call(builder, name, self.words, unsigned, signed)

    def _add_words(self, builder, counts, words):
        name = "llvm.x86.avx512.pmaddw.d.512" if self.bits == 512 else "llvm.x86.avx2.pmadd.wd"
        return builder.add(counts, self._call(builder, name, self.lanes, words, _all(self.words, 1)))


class Magnitudes(_Pairs):
    """Weights of all eight bits, as magnitudes; the activations take their signs: no two products exceed 2 * 127 * 128."""

    signed = True

    def weights(self, builder, stored):
        value = builder.xor(stored, _all(self.bytes, 0x80))
        negative = builder.icmp_signed("<", value, _all(self.bytes, 0))
        magnitude = builder.select(negative, builder.neg(value), value)
        return magnitude, value, negative

    def step(self, builder, total, weights, activations):
        magnitude, value, negative = weights
        if self.bits == 512:
            signed = builder.select(negative, builder.neg(activations), activations)
        else:
            signed = self._call(builder, "llvm.x86.avx2.psign.b", self.bytes, activations, value)
        return self._add_words(builder, total, self._bytes_times_bytes(builder, magnitude, signed))


class Nibbles(_Pairs):
    """Weights below 16: a group's eight sums of two products, at most 8 * 2 * 15 * 127, fit 16 bits."""

    def start(self, builder, counts):
        return _all(self.words, 0)

    def step(self, builder, total, weights, activations):
        return builder.add(total, self._bytes_times_bytes(builder, weights, activations))

    def finish(self, builder, counts, total):
        return self._add_words(builder, counts, total)


class Words(Dots):
    """Anything: even and odd bytes become 16-bit words, of which two neighbours are multiplied and added."""

    def weights(self, builder, stored):
        words = builder.bitcast(stored, self.words)
        return builder.and_(words, _all(self.words, 255)), builder.lshr(words, _all(self.words, 8))

    def activations(self, builder, four):
        words, eight = builder.bitcast(super().activations(builder, four), self.words), _all(self.words, 8)
        return builder.ashr(builder.shl(words, eight), eight), builder.ashr(words, eight)

    def step(self, builder, total, weights, activations):
        for a, b in zip(weights, activations, strict=True):
            total = builder.add(total, self._multiply_add(builder, a, b))
        return total

    def _multiply_add(self, builder, a, b):
        if target.is_x86():
            return self._call(builder, "llvm.x86.sse2.pmadd.wd", self.lanes, a, b)
        # A product of an unsigned and a signed byte fits 16 bits.
        products, half = builder.bitcast(builder.mul(a, b), self.lanes), _all(self.lanes, 16)
        return builder.add(builder.ashr(builder.shl(products, half), half), builder.ashr(products, half))


def best(nibbles: bool) -> Dots:
    """The dot products of this process for weights of four or of eight bits."""
    name, bits = target.kernels(), target.vector_bits()
    if name in ("vbmi", "vnni", "avxvnni"):
        return FourProducts(bits)
    if name == "generic":
        return Words(bits)
    return Nibbles(bits) if nibbles else Magnitudes(bits)
