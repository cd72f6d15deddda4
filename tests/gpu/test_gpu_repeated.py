"""Tests of the CPU suite that say nothing of a device, once more on the GPU."""

from __future__ import annotations

import pytest
from gpu_support import default_device  # noqa: F401
from test_derivatives import (  # noqa: F401
    test_double_backward_and_a_graph_that_is_kept,
    test_like_the_dequantised_weight,
    test_of_the_bias,
    test_of_the_transposed_product,
    test_vmap_over_every_argument,
)
from test_derivatives import weight as weight  # the fixture
from test_embedding import test_matches_dequantize, test_strided_indices_and_blocks  # noqa: F401
from test_linear import (  # noqa: F401
    test_blocks_of_any_strides,
    test_empty_weights,
    test_int8_is_exact_for_integers,
    test_int8_with_the_largest_codes,
    test_matmul_q4_0_takes_both_layouts,
    test_non_finite_activations_stay_in_their_row,
    test_scales_of_activations_do_not_matter,
    test_zero_activations,
)
from test_nn import (  # noqa: F401
    test_casts_leave_blocks_alone,
    test_deepcopy_and_pickle,
    test_embedding_module,
    test_from_blocks_shares_memory,
    test_loading_a_tied_pair_twice_packs_it_once,
    test_pack_keeps_ties,
    test_quantize_model_and_report,
    test_state_dict_round_trip,
    test_tied_weights_stay_tied,
    test_weight_is_read_only,
)
from test_pack import (  # noqa: F401
    test_layout_of_q4_0_by_hand,
    test_opcheck,
    test_pack_is_a_permutation_within_a_block_of_16_rows,
    test_strides,
    test_unpack_inverts_pack,
)
from test_transforms import (  # noqa: F401
    _fresh_dynamo,
    test_blocks_cannot_be_trained,
    test_compile_everything_else,
    test_compile_linear,
    test_compile_training_step,
    test_export,
    test_gradient_of_one_row_without_leading_dimensions,
    test_gradient_with_strided_upstream,
    test_gradients_match_float64,
    test_opcheck_dequantize,
    test_opcheck_embedding,
    test_opcheck_linear,
    test_opcheck_linear_transposed,
    test_opcheck_quantize,
    test_vmap_over_the_first_argument,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("default_device")]
