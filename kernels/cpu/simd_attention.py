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
from .simd import _F32, _I8, _I32, _I64, _V32, _VF, LANES, _constant, _declare, _fma, _load, _loop, _splat, _vector_at

# Queries of a register tile, and how many vectors of keys or values meet each of them: chains that fit the registers beside the
# vectors, and enough of them to hide the latency of a multiply-add.
_TILES = {512: ((12, 2), (8, 2), (4, 4), (3, 4), (2, 4), (1, 8)), 256: ((4, 1), (3, 1), (2, 2), (1, 4))}.get(
    target.vector_bits(), ((4, 1), (2, 1), (1, 2)))
_V64 = ir.VectorType(_I64, LANES // 2)
_VD = ir.VectorType(ir.DoubleType(), LANES // 2)
# Added to a float64 of 0 … 1, or of absolute value below 2**19, they leave its nearest multiple of 2**-32 in the lowest bits.
_ROUNDING, _ROUNDING_BITS = 2.0**20, 0x413 << 52
_SIGNED_ROUNDING, _SIGNED_ROUNDING_BITS = 1.5 * 2.0**20, 0x4138 << 48
_NONE = ir.Constant(_V64, [0] * (LANES // 2))
_LEAST = _constant(_VF, float("-inf"))
_TOGETHER = 4 if target.vector_bits() == 512 else 1     # vectors of scores that take the steps of exp together
_PAGES = ATTENTION_BLOCK // PAGE


def _whole(number):
    return ir.Constant(_I64, number)


def _prefetch(builder, pointer):
    pointer = builder.bitcast(pointer, _I8.as_pointer())
    function = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    builder.call(function, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


def _lowest(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _page(builder, table, page, pool, stride):
    """Where a page keeps the head."""
    number = builder.sext(builder.load(builder.gep(table, [page])), _I64)
    return builder.gep(pool, [builder.mul(number, stride)])


def _repeat(builder, count, body):
    """Emits ``for i in range(count): body(i)``, perhaps not once."""
    with builder.if_then(builder.icmp_signed(">", count, _whole(0))):
        def once(index, values):
            body(index)
            return values
        _loop(builder, count, [], once)


def _for_tiles(builder, count, body):
    """Emits body(queries of the tile, vectors, first query) for tiles that make up ``count`` queries, the largest first."""
    first = _whole(0)
    for queries, vectors in _TILES:
        left = builder.sub(count, first)
        number = builder.sdiv(left, _whole(queries))
        start = first
        _repeat(builder, number, lambda i, q=queries, v=vectors, s=start: body(q, v, builder.add(s, builder.mul(i, _whole(q)))))
        first = builder.add(first, builder.mul(number, _whole(queries)))


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
            d = builder.add(builder.mul(step, _whole(2)), _whole(sub))
            at, after = builder.mul(d, _whole(PAGE)), []
            vectors = [_load(builder, dtype, builder.gep(key, [at])) for key in keys]
            for t in range(queries):
                value = _splat(builder, builder.load(builder.gep(q, [builder.add(builder.mul(d, count), _whole(t))])))
                after += [_fma(builder, value, vectors[p], chains[t * pages + p]) for p in range(pages)]
            if sub * PAGE * dtype.bitwidth % 512 == 0:
                for pointer in ahead:
                    _prefetch(builder, builder.gep(pointer, [at]))
            chains = after
        return chains
    chains = _loop(builder, builder.sdiv(head_dim, _whole(2)), [_constant(_VF, 0.0)] * (queries * pages), steps)
    scales = _splat(builder, scale)
    for p, page in enumerate(chosen):
        slot = builder.mul(builder.and_(page, _whole(_PAGES - 1)), _whole(PAGE))
        for t in range(queries):
            pointer = builder.gep(scores, [builder.add(slot, _whole(t * ATTENTION_BLOCK))])
            value = builder.fmul(chains[t * pages + p], scales)
            builder.store(value, builder.bitcast(pointer, _VF.as_pointer())).align = 4


@intrinsic
def score_pages(typing_context, q, count, head_dim, keys, key_stride, values, value_stride, table, first, last, scale, scores):
    """Scores of ``count`` queries in the pages first … last of one block: chains over an even head_dim, times ``scale``."""
    def codegen(context, builder, signature, arguments):
        q_, count, head_dim, keys_, key_stride, values_, value_stride, table_, first, last, scale, scores_ = arguments
        number = builder.add(builder.sub(last, first), _whole(1))

        def tile(queries, pages, query):
            def group(index, carried):
                start = builder.add(first, builder.mul(index, _whole(pages)))
                chosen = [_lowest(builder, builder.add(start, _whole(p)), last) for p in range(pages)]
                own = [_page(builder, table_, page, keys_, key_stride) for page in chosen]
                ahead = [_page(builder, table_, page, values_, value_stride) for page in chosen]
                _score_tile(builder, keys.dtype, queries, pages, builder.gep(q_, [query]), count, head_dim, own, ahead, chosen,
                            scale, builder.gep(scores_, [builder.mul(query, _whole(ATTENTION_BLOCK))]))
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
        return [(builder.gep(chains, [builder.add(builder.mul(width, _whole(t)), _whole(v * LANES))]), t * vectors + v)
                for t in range(queries) for v in range(vectors)]

    def one_page(index, sums):
        page = builder.add(builder.sdiv(first, _whole(PAGE)), index)
        low = builder.mul(page, _whole(PAGE))
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
        builder.store(sums[i], builder.bitcast(pointer, _VF.as_pointer())).align = 4


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
            own_weights = builder.gep(weights_, [builder.mul(query, _whole(ATTENTION_BLOCK))])
            own_chains = builder.gep(chains_, [builder.mul(query, width)])

            def at(offset, number):
                def body(index):
                    lane = builder.mul(builder.add(offset, builder.mul(index, _whole(number))), _whole(LANES))
                    _value_tile(builder, values.dtype, queries, number, own_weights, builder.gep(values_, [lane]), value_stride,
                                width, builder.gep(keys_, [lane]), key_stride, table_, further, furthest, first, stop,
                                builder.gep(own_chains, [lane]))
                return body
            wide = min(vectors, 4)
            several = builder.sdiv(lanes, _whole(wide))
            done = builder.mul(several, _whole(wide))
            _repeat(builder, several, at(_whole(0), wide))
            if wide > 1:
                _repeat(builder, builder.sub(lanes, done), at(done, 1))
        with builder.if_then(builder.icmp_signed("<", first, stop)):
            _for_tiles(builder, count, tile)
        return context.get_dummy_value()
    number = types.intp
    signature = types.void(weights, number, values, number, number, keys, number, table, number, number, number, number, chains)
    return signature, codegen


def _exp(builder, vectors, visible):
    """The canonical e**x of vectors of x <= 0 (or NaN), zero in lanes that are not visible.

    All vectors take a step before any takes the next: a chain of such length needs company.
    """
    def call(name, values):
        function = _declare(builder, name, _VF, [_VF])
        return [builder.call(function, [value]) for value in values]

    def fma(values, factor, terms):
        return [_fma(builder, value, b, c) for value, b, c in zip(values, factor, terms, strict=True)]
    def all_of(number):
        return [_constant(_VF, float(number))] * len(vectors)
    lowest = _constant(_VF, float(EXP_LOWEST))
    below = [builder.fcmp_ordered("<", x, lowest) for x in vectors]
    clamped = [builder.select(low, lowest, x) for low, x in zip(below, vectors, strict=True)]
    n = call("llvm.rint.v16f32", [builder.fmul(x, _constant(_VF, float(LOG2E))) for x in clamped])
    minus = [builder.fneg(x) for x in n]
    r = fma(minus, all_of(LN2_HIGH), clamped)
    r = fma(minus, all_of(LN2_LOW), r)
    p = all_of(EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        p = fma(p, r, all_of(coefficient))
    exponents = [builder.add(builder.fptosi(x, _V32), _constant(_V32, 127)) for x in n]
    scales = [builder.bitcast(builder.shl(exponent, _constant(_V32, 23)), _VF) for exponent in exponents]
    results = [builder.fmul(value, scale) for value, scale in zip(p, scales, strict=True)]
    kept = [builder.and_(builder.not_(low), lanes) for low, lanes in zip(below, visible, strict=True)]
    return [builder.select(lanes, value, _constant(_VF, 0.0)) for lanes, value in zip(kept, results, strict=True)]


def _higher(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _highest(builder, vector):
    """The maximum of a vector's lanes."""
    for lanes in (8, 4, 2, 1):
        turned = ir.Constant(_V32, [(i + lanes) % LANES for i in range(LANES)])
        vector = _higher(builder, vector, builder.shuffle_vector(vector, vector, turned))
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _add_fixed(builder, totals, vector, rounding):
    """Adds the fixed-point form of sixteen float32, and the bits of ``rounding`` with each, to two vectors of int64."""
    after = []
    for half, total in enumerate(totals):
        lanes = ir.Constant(ir.VectorType(_I32, LANES // 2), list(range(half * LANES // 2, (half + 1) * LANES // 2)))
        wide = builder.fpext(builder.shuffle_vector(vector, vector, lanes), _VD)
        rounded = builder.fadd(wide, ir.Constant(_VD, [rounding] * (LANES // 2)))
        after.append(builder.add(total, builder.bitcast(rounded, _V64)))
    return after


def _splat32(builder, whole):
    undefined = ir.Constant(_V32, ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(whole, _I32), ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _constant(_V32, 0))


def _splat64(builder, whole):
    return builder.shuffle_vector(builder.insert_element(_NONE, whole, ir.Constant(_I32, 0)), _NONE,
                                  ir.Constant(ir.VectorType(_I32, LANES // 2), [0] * (LANES // 2)))


@intrinsic
def weigh_scores(typing_context, scores, low, high):
    """scores[i] = exp(scores[i] - maximum) for low <= i < high; returns (maximum, sum of rint(scores[i] * 2**32)).

    Their neighbours in the block may become zero. A NaN among the scores becomes a NaN weight.
    """
    pair, span = types.Tuple((types.float32, types.int64)), _TOGETHER * LANES
    def codegen(context, builder, signature, arguments):
        scores_, low, high = arguments
        first = builder.sdiv(low, _whole(span))
        count = builder.sub(builder.sdiv(builder.add(high, _whole(span - 1)), _whole(span)), first)

        # Positions from ``low`` on, of the vectors of the first step; as unsigned numbers, those before it are high ones.
        start = builder.sub(builder.mul(first, _whole(span)), low)
        lanes = [builder.add(_splat32(builder, start), ir.Constant(_V32, list(range(i * LANES, (i + 1) * LANES))))
                 for i in range(_TOGETHER)]
        length = _splat32(builder, builder.sub(high, low))

        def at(index, lanes):
            place = builder.mul(builder.add(first, index), _whole(span))
            pointers = [builder.gep(scores_, [builder.add(place, _whole(i * LANES))]) for i in range(_TOGETHER)]
            values = [_vector_at(builder, pointer, _VF, 4) for pointer in pointers]
            visible = [builder.icmp_unsigned("<", vector, length) for vector in lanes]
            return pointers, values, visible, [builder.add(vector, _constant(_V32, span)) for vector in lanes]

        def largest(index, carried):
            _, values, visible, following = at(index, carried[:_TOGETHER])
            seen = [builder.select(lanes, value, _LEAST) for lanes, value in zip(visible, values, strict=True)]
            return following + [_higher(builder, a, b) for a, b in zip(seen, carried[_TOGETHER:], strict=True)]
        maxima = _loop(builder, count, lanes + [_LEAST] * _TOGETHER, largest)[_TOGETHER:]
        for other in maxima[1:]:
            maxima[0] = _higher(builder, maxima[0], other)
        maximum = _highest(builder, maxima[0])
        spread = _splat(builder, maximum)

        def weights(index, carried):
            pointers, values, visible, following = at(index, carried[:_TOGETHER])
            sums = carried[_TOGETHER:]
            values = _exp(builder, [builder.fsub(value, spread) for value in values], visible)
            for pointer, value in zip(pointers, values, strict=True):
                builder.store(value, builder.bitcast(pointer, _VF.as_pointer())).align = 4
                sums = _add_fixed(builder, sums, value, _ROUNDING)
            return following + sums
        halves = _loop(builder, count, lanes + [_NONE] * 2, weights)[_TOGETHER:]
        total = builder.call(_declare(builder, "llvm.vector.reduce.add.v8i64", _I64, [_V64]), [builder.add(*halves)])
        total = builder.sub(total, builder.mul(count, _whole(_ROUNDING_BITS * span % 2**64)))
        return context.make_tuple(builder, signature.return_type, [maximum, total])
    return pair(scores, types.intp, types.intp), codegen


@intrinsic
def merge_blocks(typing_context, chains, weights, blocks, chain_stride, weight_stride, head_dim, divisor):
    """chains[:head_dim] = sum of weights * chains over ``blocks`` blocks, as fixed point, divided by ``divisor``.

    Returns whether all terms were within a block value's range.
    """
    def codegen(context, builder, signature, arguments):
        chains_, weights_, blocks, chain_stride, weight_stride, head_dim, divisor = arguments
        iota, wide = ir.Constant(_V32, list(range(LANES))), ir.VectorType(_F32, LANES // 2)
        correction = _splat64(builder, builder.mul(blocks, _whole(_SIGNED_ROUNDING_BITS)))

        def vector(index, carried):
            at = builder.mul(index, _whole(LANES))
            held = builder.icmp_signed("<", iota, _splat32(builder, builder.sub(head_dim, at)))
            place = builder.gep(chains_, [at])

            def block(b, carried):
                weight = builder.load(builder.gep(weights_, [builder.mul(b, weight_stride)]))
                value = _vector_at(builder, builder.gep(place, [builder.mul(b, chain_stride)]), _VF, 4)
                value = builder.select(held, builder.fmul(value, _splat(builder, weight)), _constant(_VF, 0.0))
                magnitude = builder.and_(builder.bitcast(value, _V32), _constant(_V32, 0x7FFFFFFF))
                bits = builder.call(_declare(builder, "llvm.umax.v16i32", _V32, [_V32, _V32]), [carried[0], magnitude])
                return [bits, *_add_fixed(builder, carried[1:], value, _SIGNED_ROUNDING)]
            bits, *totals = _loop(builder, blocks, [*carried, _NONE, _NONE], block)
            parts = []
            for total in totals:
                exact = builder.sitofp(builder.sub(total, correction), _VD)
                parts.append(builder.fptrunc(builder.fmul(exact, ir.Constant(_VD, [UNFIXED] * (LANES // 2))), wide))
            result = builder.fdiv(builder.shuffle_vector(*parts, iota), _splat(builder, divisor))
            builder.store(result, builder.bitcast(place, _VF.as_pointer())).align = 4
            return [bits]
        count = builder.sdiv(builder.add(head_dim, _whole(LANES - 1)), _whole(LANES))
        (bits,) = _loop(builder, count, [_constant(_V32, 0)], vector)
        within = builder.icmp_unsigned("<", bits, _constant(_V32, int(BLOCK_LIMIT.view("i4"))))
        mask = ir.IntType(LANES)
        return builder.icmp_unsigned("==", builder.bitcast(within, mask), ir.Constant(mask, 2**LANES - 1))
    number = types.intp
    return types.boolean(chains, weights, number, number, number, number, types.float32), codegen
