"""Weight formats: block and group geometry, bit layout, canonical bytes, joining shards."""

import hashlib
from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest

from llama_hpc.kernels import formats
from llama_hpc.kernels.formats import FACTORS, Blocks, Packed, concatenate, pack_codes, pack_int4, unpack_codes

# (k, block): sizes of real models, and blocks of a head (8, 48, 64) or of an FFN cut (32, 64).
GEOMETRIES = [(8, 8), (12, 256), (43, 256), (48, 48), (172, 32), (172, 256), (288, 48), (288, 256), (576, 64),
              (896, 256), (5632, 256)]


def packed(n, blocks, seed=0):
    """A q3_5 tensor of random fields."""
    rng = np.random.default_rng(seed)
    codes = pack_codes(rng.integers(0, 128, (n, blocks.groups, 16)))
    scales = rng.integers(0, 16, (n, blocks.groups), np.uint8)
    rows = rng.random(n).astype(np.float16).view(np.uint16)
    codebook = rng.integers(-127, 128, (128, 2)).astype(np.int8)
    return Packed("q3_5", n, blocks, codes, scales, rows, codebook)


def packed_q4(n, blocks, seed=0):
    """A q4 tensor of random fields."""
    rng = np.random.default_rng(seed)
    scales = rng.standard_normal((n, blocks.groups)).astype(np.float16).view(np.uint16)
    return Packed("q4", n, blocks, rng.integers(0, 256, (n, blocks.groups, 16), np.uint8), scales)


@pytest.mark.parametrize("k, block", GEOMETRIES)
def test_groups_start_afresh_in_each_block(k, block):
    blocks = Blocks(k, block)
    groups = [list(range(first, min(first + 32, start + block, k)))
              for start in range(0, k, block) for first in range(start, min(start + block, k), 32)]
    assert blocks.groups == len(groups) and blocks.padded == 32 * len(groups)
    assert blocks.n_blocks == len(range(0, k, block))
    values = np.arange(1, 2 * k + 1, dtype=np.float32).reshape(2, k)
    padded = blocks.pad(values)
    for group, members in enumerate(groups):
        np.testing.assert_array_equal(padded[:, group, :len(members)], values[:, members])
        assert not padded[:, group, len(members):].any()
    np.testing.assert_array_equal(blocks.unpad(padded), values)


def test_known_geometry():
    assert Blocks(48, 48).groups == 2
    assert Blocks(172, 256).groups == 6
    assert Blocks(96, 48).groups == 4 and Blocks(96, 48).groups_per_block == 2
    assert Blocks(0, 256).groups == 0 and Blocks(0, 256).n_blocks == 0


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="must be 48"):
        Blocks(48, 48).pad(np.zeros((2, 47)))
    with pytest.raises(ValueError, match="2 groups"):
        Blocks(48, 48).unpad(np.zeros((2, 3, 32)))
    with pytest.raises(ValueError, match="block >= 1"):
        Blocks(48, 0)


def test_codes_are_little_endian_seven_bit_fields():
    indices = np.random.default_rng(1).integers(0, 128, (50, 16))
    for row, code in zip(indices, pack_codes(indices), strict=True):
        number = sum(int(index) << 7 * pair for pair, index in enumerate(row))
        assert code.tobytes() == number.to_bytes(14, "little")
    np.testing.assert_array_equal(unpack_codes(pack_codes(indices)), indices)


def test_factors_are_the_stated_series():
    with localcontext() as context:
        context.prec = 40
        series = [(-1) ** j * Decimal(2) ** (Decimal("0.2") - Decimal("0.055") * j - Decimal("0.005") * j * j)
                  for j in range(16)]
    np.testing.assert_array_equal(FACTORS, np.array([float(factor) for factor in series], np.float32))


def test_canonical_bytes_of_q3_5():
    tensor = packed(3, Blocks(43, 32))
    data = tensor.bytes()
    assert len(data) == tensor.nbytes == 256 + 3 * 2 + 3 * 1 + 3 * 2 * 14
    np.testing.assert_array_equal(np.frombuffer(data[:256], np.int8).reshape(128, 2), tensor.codebook)
    np.testing.assert_array_equal(np.frombuffer(data[256:262], "<u2"), tensor.row_scales)
    assert list(data[262:265]) == [int(a) | int(b) << 4 for a, b in tensor.scales]
    assert data[265:] == tensor.codes.tobytes()
    assert tensor.bits_per_weight() == 8 * len(data) / (3 * 43)
    assert tensor.sha256() == hashlib.sha256(b"q3_5 3 43 32\n" + data).hexdigest()


def test_an_odd_group_ends_its_row_with_a_zero_nibble():
    tensor = packed(2, Blocks(288, 256))
    scales = np.frombuffer(tensor.bytes(), np.uint8)[256 + 4:][:10].reshape(2, 5)
    np.testing.assert_array_equal(scales[:, 4], tensor.scales[:, 8])


def test_canonical_bytes_of_q8():
    values = np.arange(-32, 32, dtype=np.int8).reshape(1, 2, 32)
    scales = np.array([[1.0, 0.5]], np.float16)
    tensor = Packed("q8", 1, Blocks(64, 256), values, scales.view(np.uint16))
    assert tensor.bytes() == values.tobytes() + scales.astype("<f2").tobytes()
    assert tensor.bits_per_weight() == 8.5
    np.testing.assert_array_equal(tensor.dequantize()[0], np.arange(-32, 32) * np.repeat([1, 0.5], 32))


def test_canonical_bytes_of_q4():
    values = np.tile(np.arange(-8, 8, dtype=np.int8), 4).reshape(1, 2, 32)
    scales = np.array([[1.0, -0.5]], np.float16)
    tensor = Packed("q4", 1, Blocks(64, 256), pack_int4(values), scales.view(np.uint16))
    # Value + 8, the even k in the low bits: (-8, -7) is 0x10.
    row = bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    assert tensor.bytes() == 4 * row + scales.astype("<f2").tobytes() and len(tensor.bytes()) == tensor.nbytes
    assert tensor.bits_per_weight() == 4.5
    assert tensor.sha256() == hashlib.sha256(b"q4 1 64 256\n" + tensor.bytes()).hexdigest()
    unpacked, factors, row_scales = tensor.unpack()
    np.testing.assert_array_equal(unpacked, values)
    assert unpacked.dtype == np.int8 and factors.tolist() == [[1.0, -0.5]] and row_scales.tolist() == [1.0]
    np.testing.assert_array_equal(tensor.dequantize()[0], np.tile(np.arange(-8, 8), 4) * np.repeat([1, -0.5], 32))


def test_a_weight_is_value_times_factor_times_row_scale():
    tensor = packed(2, Blocks(44, 32))
    weights = tensor.dequantize()
    for n in range(2):
        for k in range(44):
            group = k // 32
            code = int.from_bytes(tensor.codes[n, group].tobytes(), "little") >> 7 * (k % 32 // 2) & 127
            scaled = np.float32(tensor.codebook[code, k % 2]) * FACTORS[tensor.scales[n, group]]
            assert weights[n, k] == scaled * np.float32(tensor.row_scales.view(np.float16)[n])


def test_bits_per_weight_of_real_shapes():
    for n, k in [(576, 576), (1536, 576), (896, 896), (2048, 5632), (4096, 4096)]:
        assert 3.62 < packed(n, Blocks(k, 256)).bits_per_weight() < 3.67
    assert packed(4096, Blocks(4096, 256)).bits_per_weight() == pytest.approx(3.629, abs=1e-3)


@pytest.mark.parametrize("whole", [packed(5, Blocks(172, 32)), packed_q4(5, Blocks(172, 32))], ids=["q3_5", "q4"])
def test_shards_are_joined_by_rows_and_by_columns(whole):
    tops = [replace(whole, n=len(rows), codes=whole.codes[rows], scales=whole.scales[rows],
                    row_scales=None if whole.row_scales is None else whole.row_scales[rows],
                    codebook=None if whole.codebook is None else whole.codebook.copy()) for rows in ([0, 1], [], [2, 3, 4])]
    assert concatenate(tops, 0).sha256() == whole.sha256()
    assert concatenate(tops[1:], 0).sha256() == whole.rows(2).sha256()
    cuts = [(0, 2), (2, 2), (2, 6)]
    sides = [replace(whole, blocks=Blocks(min(b * 32, 172) - a * 32, 32), codes=whole.codes[:, a:b],
                     scales=whole.scales[:, a:b]) for a, b in cuts]
    assert concatenate(sides, 1).sha256() == whole.sha256()


def test_shards_of_different_tensors_are_not_joined():
    blocks = Blocks(48, 32)
    a, b = packed(2, blocks, 0), packed(2, blocks, 1)
    with pytest.raises(ValueError, match="one codebook"):
        concatenate([a, b], 0)
    same = Packed("q3_5", 2, blocks, b.codes, b.scales, b.row_scales, a.codebook)
    with pytest.raises(ValueError, match="row scales"):
        concatenate([a, same], 1)
    with pytest.raises(ValueError, match="not cut at blocks"):
        concatenate([a, a], 1)
    for other in (packed(2, Blocks(48, 48)), packed_q4(2, blocks)):
        with pytest.raises(ValueError, match="one format"):
            concatenate([a, other], 0)


def test_formats_state_their_bits():
    for kind, bits in (("q8", 8.5), ("q4", 4.5), ("q3_5", 3.625)):
        row = formats.FORMATS[kind]
        assert (8 * row.code_bytes + row.factor_bits) / 32 == bits
    for kind, size in (("f16", 2), ("f32", 4)):
        assert formats.packed_bytes(kind, 5, Blocks(172, 32)) == 5 * 172 * size
    kinds = ("f32", "f16", "q8", "q4", "q3_5")
    assert [formats.table_format(kind) for kind in kinds] == ["f32", "f16", "q8", "q8", "q8"]
    assert [formats.table_format(kind, "head") for kind in kinds] == ["f32", "f16", "q8", "q4", "q4"]
