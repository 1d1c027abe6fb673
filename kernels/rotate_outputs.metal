// rotate_outputs: attention's outputs in the rotated domain [B, Hq, L, VD] -> R^T(o / lambda) sigma
// + mu as [B, L, Hq, VD], the order in which a model's projection takes them.
//
// Layout: x with any strides; out row contiguous. info: query heads per KV head.
// Grid, limits: as rotate_queries.
const uint lane = thread_index_in_simdgroup;
const int Hq = x_shape[1];
const int L = x_shape[2];
const int count = x_shape[0] * Hq * L;
const int first = (int(threadgroup_position_in_grid.x) * 4 + int(simdgroup_index_in_threadgroup)) *
    kvq::vectors_of(VD);
const auto at = kvq::place_of<VD>(
    first, count, Hq, L, x_strides[0], x_strides[1], x_strides[2], lane);
const int64_t to = (int64_t(at.row / (Hq * L)) * L + at.row % L) * Hq + at.head;
kvq::finish_row<VD, ROTATION, V_CALIBRATED>(
    out + to * VD,
    x + at.offset,
    x_strides[3],
    float2(1.0f, 1.0f),
    table,
    at.head / info[kvq::HEADS],
    at.valid,
    lane);
