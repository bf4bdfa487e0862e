"""In the place of vLLM's compiled operators: their names, without kernels.

vLLM's layers look these up in their constructors, whatever they use afterwards. Called, each raises NotImplementedError
and names itself. No more are defined than constructors and imports ask for: elsewhere vLLM takes the presence of an
operator for a feature.
"""

from torch.library import Library

_ONE_INPUT = "(Tensor! out, Tensor input) -> ()"
_SCHEMAS = (
    *(
        f"{name}{_ONE_INPUT}"
        for name in (
            "silu_and_mul",
            "mul_and_silu",
            "gelu_and_mul",
            "gelu_tanh_and_mul",
            "gelu_new",
            "gelu_fast",
            "gelu_quick",
            "relu_squared",
            "relu2_no_mul",
        )
    ),
    "fatrelu_and_mul(Tensor! out, Tensor input, float threshold) -> ()",
    "situ_and_mul(Tensor! out, Tensor input, float beta, float linear_beta) -> ()",
    "silu_and_mul_with_clamp(Tensor! out, Tensor input, float limit, float alpha, float beta) -> ()",
    "rms_norm(Tensor! out, Tensor input, Tensor? weight, float epsilon) -> ()",
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
    "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
)
_FEATURES = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
    "mxfp4_experts_quant_supported",
)


def _none_of_it(capability: int) -> bool:
    return False


_library = Library("_C", "FRAGMENT")  # what it defined goes with it, so it stays
for _schema in _SCHEMAS:
    _library.define(_schema)
for _name in _FEATURES:
    _library.define(f"{_name}(int capability) -> bool")
    _library.impl(_name, _none_of_it, "CompositeImplicitAutograd")
