"""Register tiles of attention: scores of keys, weights of scores, and weighted values, for several queries at a time.

Queries lie transposed, float32 [head_dim, queries]; scores and weights float32 [queries, 256], by position within the block;
chains float32 [queries, width]. Pages of a pool are reached through a table of page numbers, int32; a pool is a pointer to where
the first page keeps the head, and the elements from page to page. Each of the loops over keys and values asks for the memory that
the next one will read: values for the same positions, keys for the next block.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..numerics import ATTENTION_BLOCK, BLOCK_LIMIT, EXP_COEFFICIENTS, EXP_LOWEST, LN2_HIGH, LN2_LOW, LOG2E, PAGE, UNFIXED
from . import target
from .simd import _F32, _I8, _I32, _I64, _VF, LANES, _declare, _fma, _load, _loop, _splat, _vector_at
from .simd_dots import _lanes, _vectors

# Queries of a register tile, and how many vectors of keys or values meet each of them: chains that fit the registers beside the
# vectors, and enough of them to hide the latency of a multiply-add.
_TILES = {512: ((12, 2), (8, 2), (4, 4), (3, 4), (2, 4), (1, 8)), 256: ((4, 1), (3, 1), (2, 2), (1, 4))}.get(
    target.vector_bits(), ((4, 1), (2, 1), (1, 2)))
# Scores that pass through exp together: so long a chain of instructions needs company.
_SPAN = 64 if target.vector_bits() == 512 else LANES
# Added to a float64 of 0 … 1, or of absolute value below 2**19, they leave its nearest multiple of 2**-32 in the lowest bits.
_ROUNDING, _ROUNDING_BITS = 2.0**20, 0x413 << 52
_SIGNED_ROUNDING, _SIGNED_ROUNDING_BITS = 1.5 * 2.0**20, 0x4138 << 48
_PAGES = ATTENTION_BLOCK // PAGE


def _whole(number):
    return ir.Constant(_I64, number)


def _times(builder, value, number):
    return builder.mul(value, _whole(number))


def _lowest(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def _prefetch(builder, pointer):
    """Asks for a line, as far as the second-level cache: the first one holds what is in use."""
    pointer = builder.bitcast(pointer, _I8.as_pointer())
    function = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    builder.call(function, [pointer, *(ir.Constant(_I32, number) for number in (0, 2, 1))])


def _page(builder, table, page, pool, stride):
    """Where a page keeps the head."""
    number = builder.sext(builder.load(builder.gep(table, [page])), _I64)
    return builder.gep(pool, [builder.mul(number, stride)])


def _repeat(builder, count, body):
    """Emits ``for i in range(count): body(i)``, perhaps not once."""
    def once(index, values):
        body(index)
        return values
    with builder.if_then(builder.icmp_signed(">", count, _whole(0))):
        _loop(builder, count, [], once)


def _for_tiles(builder, count, body):
    """Emits body(queries of the tile, vectors, first query) for tiles that make up ``count`` queries, the largest first."""
    first = _whole(0)
    for queries, vectors in _TILES:
        number = builder.sdiv(builder.sub(count, first), _whole(queries))
        def tile(index, queries=queries, vectors=vectors, first=first):
            body(queries, vectors, builder.add(first, _times(builder, index, queries)))
        _repeat(builder, number, tile)
        first = builder.add(first, _times(builder, number, queries))


@intrinsic
def shifted(typing_context, pointer, count):
    """A pointer ``count`` elements on."""
    def codegen(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])
    return pointer(pointer, types.intp), codegen


def _score_tile(builder, dtype, queries, pages, q, count, head_dim, keys, ahead, chosen, scale, scores):
    """Scores of ``queries`` queries from q[0] on in ``pages`` pages; ``chosen``: their numbers, repeated where they are fewer."""
    def steps(step, chains):
        for sub in range(2):
            d = builder.add(_times(builder, step, 2), _whole(sub))
            at, after = _times(builder, d, PAGE), []
            vectors = [_load(builder, dtype, builder.gep(key, [at])) for key in keys]
            for t in range(queries):
                value = _splat(builder, builder.load(builder.gep(q, [builder.add(builder.mul(d, count), _whole(t))])))
                after += [_fma(builder, value, vectors[p], chains[t * pages + p]) for p in range(pages)]
            if sub * PAGE * dtype.bitwidth % 512 == 0:
                for pointer in ahead:
                    _prefetch(builder, builder.gep(pointer, [at]))
            chains = after
        return chains
    chains = _loop(builder, builder.sdiv(head_dim, _whole(2)), [ir.Constant(_VF, [0.0] * LANES)] * (queries * pages), steps)
    scales = _splat(builder, scale)
    for p, page in enumerate(chosen):
        slot = builder.mul(builder.and_(page, _whole(_PAGES - 1)), _whole(PAGE))
        for t in range(queries):
            pointer = builder.gep(scores, [builder.add(slot, _whole(t * ATTENTION_BLOCK))])
            _store(builder, builder.fmul(chains[t * pages + p], scales), pointer)


@intrinsic
def score_pages(typing_context, q, count, head_dim, keys, key_stride, values, value_stride, table, first, last, scale, scores):
    """Scores of ``count`` queries in the pages first … last of one block: chains over an even head_dim, times ``scale``."""
    def codegen(context, builder, signature, arguments):
        q_, count, head_dim, keys_, key_stride, values_, value_stride, table_, first, last, scale, scores_ = arguments
        number = builder.add(builder.sub(last, first), _whole(1))

        def tile(queries, pages, query):
            def group(index, carried):
                start = builder.add(first, _times(builder, index, pages))
                chosen = [_lowest(builder, builder.add(start, _whole(p)), last) for p in range(pages)]
                own = [_page(builder, table_, page, keys_, key_stride) for page in chosen]
                ahead = [_page(builder, table_, page, values_, value_stride) for page in chosen]
                _score_tile(builder, keys.dtype, queries, pages, builder.gep(q_, [query]), count, head_dim, own, ahead, chosen,
                            scale, builder.gep(scores_, [_times(builder, query, ATTENTION_BLOCK)]))
                return carried
            groups = builder.sdiv(builder.add(number, _whole(pages - 1)), _whole(pages))
            _loop(builder, groups, [], group)
        _for_tiles(builder, count, tile)
        return context.get_dummy_value()
    number = types.intp
    return types.void(q, number, number, keys, number, values, number, table, number, number, types.float32, scores), codegen


def _value_tile(builder, dtype, queries, vectors, weights, values, stride, width, ahead, ahead_stride, table, further, furthest,
                first, stop, chains):
    """Adds values of positions first … stop - 1, times weights, to ``vectors`` vectors of the chains of ``queries`` queries."""
    def places():
        return [(builder.gep(chains, [builder.add(_times(builder, width, t), _whole(v * LANES))]), t * vectors + v)
                for t in range(queries) for v in range(vectors)]

    def one_page(index, sums):
        page = builder.add(builder.sdiv(first, _whole(PAGE)), index)
        low = _times(builder, page, PAGE)
        high = _lowest(builder, builder.add(low, _whole(PAGE)), stop)
        low = builder.select(builder.icmp_signed("<", low, first), first, low)
        row = builder.mul(builder.and_(low, _whole(PAGE - 1)), width)
        own = builder.gep(_page(builder, table, page, values, stride), [row])
        later = _page(builder, table, _lowest(builder, builder.add(page, further), furthest), ahead, ahead_stride)
        later = builder.gep(later, [row])
        weight = builder.gep(weights, [builder.and_(low, _whole(ATTENTION_BLOCK - 1))])

        def one_position(slot, sums):
            at, after = builder.mul(slot, width), []
            loaded = []
            for v in range(vectors):
                here = builder.add(at, _whole(v * LANES))
                loaded.append(_load(builder, dtype, builder.gep(own, [here])))
                if v * LANES * dtype.bitwidth % 512 == 0:
                    _prefetch(builder, builder.gep(later, [here]))
            for t in range(queries):
                pointer = builder.gep(weight, [builder.add(slot, _whole(t * ATTENTION_BLOCK))])
                value = _splat(builder, builder.load(pointer))
                after += [_fma(builder, value, loaded[v], sums[t * vectors + v]) for v in range(vectors)]
            return after
        return _loop(builder, builder.sub(high, low), sums, one_position)
    sums = [_vector_at(builder, pointer, _VF, 4) for pointer, _ in places()]
    last = builder.sdiv(builder.sub(stop, _whole(1)), _whole(PAGE))
    pages = builder.add(builder.sub(last, builder.sdiv(first, _whole(PAGE))), _whole(1))
    sums = _loop(builder, pages, sums, one_page)
    for pointer, i in places():
        _store(builder, sums[i], pointer)


@intrinsic
def weigh_values(typing_context, weights, count, values, value_stride, width, keys, key_stride, table, further, furthest, first,
                 stop, chains):
    """Adds the values of positions first … stop - 1 of one block, times weights, to the chains of ``count`` queries.

    Positions ascend in every chain. Keys are asked for ``further`` pages on, at most page ``furthest``.
    """
    def codegen(context, builder, signature, arguments):
        (weights_, count, values_, value_stride, width, keys_, key_stride, table_, further, furthest, first, stop,
         chains_) = arguments
        lanes = builder.sdiv(width, _whole(LANES))

        def tile(queries, vectors, query):
            own_weights = builder.gep(weights_, [_times(builder, query, ATTENTION_BLOCK)])
            own_chains = builder.gep(chains_, [builder.mul(query, width)])

            def at(offset, number):
                def body(index):
                    lane = builder.mul(builder.add(offset, _times(builder, index, number)), _whole(LANES))
                    _value_tile(builder, values.dtype, queries, number, own_weights, builder.gep(values_, [lane]), value_stride,
                                width, builder.gep(keys_, [lane]), key_stride, table_, further, furthest, first, stop,
                                builder.gep(own_chains, [lane]))
                return body
            wide = min(vectors, 4)
            several = builder.sdiv(lanes, _whole(wide))
            done = _times(builder, several, wide)
            _repeat(builder, several, at(_whole(0), wide))
            if wide > 1:
                _repeat(builder, builder.sub(lanes, done), at(done, 1))
        with builder.if_then(builder.icmp_signed("<", first, stop)):
            _for_tiles(builder, count, tile)
        return context.get_dummy_value()
    number = types.intp
    signature = types.void(weights, number, values, number, number, keys, number, table, number, number, number, number, chains)
    return signature, codegen


def _all(llvm_vector, number):
    return ir.Constant(llvm_vector, [number] * llvm_vector.count)


def _like(vector, element):
    """The type of a vector of as many lanes."""
    return ir.VectorType(element, vector.type.count)


def _spread(builder, scalar, lanes):
    """A vector of so many times the same number."""
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, _all(ir.VectorType(_I32, lanes), 0))


def _call(builder, name, *vectors):
    """An LLVM intrinsic over vectors of one type."""
    kind = vectors[0].type
    letter = "f" if kind.element == _F32 else "i"
    function = _declare(builder, f"llvm.{name}.v{kind.count}{letter}32", kind, [kind] * len(vectors))
    return builder.call(function, vectors)


def _folded(builder, vector, lanes, combine):
    """The two halves of a vector combined, until ``lanes`` are left."""
    while vector.type.count > lanes:
        vector = combine(*_vectors(builder, vector, vector.type, 2))
    return vector


def _exp(builder, x):
    """The canonical e**x of a vector of x <= 0 (or NaN), and in which lanes it is not zero for being too small."""
    words = _like(x, _I32)
    def number(value):
        return _all(x.type, float(value))
    enough = builder.fcmp_unordered(">=", x, number(EXP_LOWEST))
    clamped = builder.select(enough, x, number(EXP_LOWEST))
    n = _call(builder, "rint", builder.fmul(clamped, number(LOG2E)))
    r = _call(builder, "fma", builder.fneg(n), number(LN2_HIGH), clamped)
    r = _call(builder, "fma", builder.fneg(n), number(LN2_LOW), r)
    p = number(EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        p = _call(builder, "fma", p, r, number(coefficient))
    exponent = builder.shl(builder.add(builder.fptosi(n, words), _all(words, 127)), _all(words, 23))
    return builder.fmul(p, builder.bitcast(exponent, x.type)), enough


def _fixed(builder, vector, rounding):
    """The fixed-point form of float32, int64 multiples of 2**-32, with the bits of ``rounding`` added to each."""
    wide = builder.fpext(vector, _like(vector, ir.DoubleType()))
    return builder.bitcast(builder.fadd(wide, _all(wide.type, rounding)), _like(vector, _I64))


@intrinsic
def weigh_scores(typing_context, scores, low, high):
    """scores[i] = exp(scores[i] - maximum) for low <= i < high; returns (maximum, sum of rint(scores[i] * 2**32)).

    Their neighbours in the block may become zero. A NaN among the scores becomes a NaN weight.
    """
    def codegen(context, builder, signature, arguments):
        scores_, low, high = arguments
        floats, words = (ir.VectorType(element, _SPAN) for element in (_F32, _I32))
        first = builder.sdiv(low, _whole(_SPAN))
        count = builder.sub(builder.sdiv(builder.add(high, _whole(_SPAN - 1)), _whole(_SPAN)), first)
        # Positions from ``low`` on, of the first span; as unsigned numbers, those before it are high ones.
        start = builder.trunc(builder.sub(_times(builder, first, _SPAN), low), _I32)
        places = builder.add(_spread(builder, start, _SPAN), _lanes(_SPAN))
        length = _spread(builder, builder.trunc(builder.sub(high, low), _I32), _SPAN)
        least = _all(floats, float("-inf"))

        def at(index):
            pointer = builder.gep(scores_, [_times(builder, builder.add(first, index), _SPAN)])
            return pointer, _vector_at(builder, pointer, floats, 4)

        def higher(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def largest(index, carried):
            places, maxima = carried
            visible = builder.icmp_unsigned("<", places, length)
            maxima = higher(builder.select(visible, at(index)[1], least), maxima)
            return [builder.add(places, _all(words, _SPAN)), maxima]
        _, maxima = _loop(builder, count, [places, least], largest)
        maximum = builder.extract_element(_folded(builder, maxima, 1, higher), ir.Constant(_I32, 0))

        def weights(index, carried):
            places, sums = carried
            pointer, value = at(index)
            value, enough = _exp(builder, builder.fsub(value, _spread(builder, maximum, _SPAN)))
            kept = builder.and_(enough, builder.icmp_unsigned("<", places, length))
            value = builder.select(kept, value, _all(floats, 0.0))
            _store(builder, value, pointer)
            sums = builder.add(sums, _folded(builder, _fixed(builder, value, _ROUNDING), LANES, builder.add))
            return [builder.add(places, _all(words, _SPAN)), sums]
        _, sums = _loop(builder, count, [places, _all(ir.VectorType(_I64, LANES), 0)], weights)
        total = builder.extract_element(_folded(builder, sums, 1, builder.add), ir.Constant(_I32, 0))
        total = builder.sub(total, _times(builder, count, _ROUNDING_BITS * _SPAN % 2**64))
        return context.make_tuple(builder, signature.return_type, [maximum, total])
    return types.Tuple((types.float32, types.int64))(scores, types.intp, types.intp), codegen


@intrinsic
def merge_blocks(typing_context, chains, weights, blocks, chain_stride, weight_stride, head_dim, divisor):
    """chains[:head_dim] = sum of weights * chains over ``blocks`` blocks, as fixed point, divided by ``divisor``.

    Returns whether all terms were within a block value's range.
    """
    def codegen(context, builder, signature, arguments):
        chains_, weights_, blocks, chain_stride, weight_stride, head_dim, divisor = arguments
        words, sums = ir.VectorType(_I32, LANES), ir.VectorType(_I64, LANES)
        correction = _spread(builder, _times(builder, blocks, _SIGNED_ROUNDING_BITS), LANES)

        def vector(index, carried):
            at = _times(builder, index, LANES)
            rest = builder.trunc(builder.sub(head_dim, at), _I32)
            held = builder.icmp_signed("<", _lanes(LANES), _spread(builder, rest, LANES))
            place = builder.gep(chains_, [at])

            def block(b, carried):
                bits, totals = carried
                weight = builder.load(builder.gep(weights_, [builder.mul(b, weight_stride)]))
                value = _vector_at(builder, builder.gep(place, [builder.mul(b, chain_stride)]), _VF, 4)
                value = builder.select(held, builder.fmul(value, _splat(builder, weight)), _all(_VF, 0.0))
                magnitude = builder.and_(builder.bitcast(value, words), _all(words, 0x7FFFFFFF))
                return [_call(builder, "umax", bits, magnitude), builder.add(totals, _fixed(builder, value, _SIGNED_ROUNDING))]
            bits, totals = _loop(builder, blocks, [*carried, _all(sums, 0)], block)
            exact = builder.sitofp(builder.sub(totals, correction), ir.VectorType(ir.DoubleType(), LANES))
            result = builder.fptrunc(builder.fmul(exact, _all(exact.type, UNFIXED)), _VF)
            _store(builder, builder.fdiv(result, _splat(builder, divisor)), place)
            return [bits]
        vectors = builder.sdiv(builder.add(head_dim, _whole(LANES - 1)), _whole(LANES))
        (bits,) = _loop(builder, vectors, [_all(words, 0)], vector)
        highest = _folded(builder, bits, 1, lambda a, b: _call(builder, "umax", a, b))
        limit = ir.Constant(_I32, int(BLOCK_LIMIT.view("i4")))
        return builder.icmp_unsigned("<", builder.extract_element(highest, ir.Constant(_I32, 0)), limit)
    number = types.intp
    return types.boolean(chains, weights, number, number, number, number, types.float32), codegen
