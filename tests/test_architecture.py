"""The plan of the house: who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fla.modules

ROOT = Path(fla.__file__).parent
ENGINES = {"simple_gla", "attn", "kda"}
FACES = {getattr(fla.ops, name).__module__ for name in fla.ops.__all__}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def starting(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


def test_the_hall_imports_no_operator():
    for path in (ROOT / "ops" / "common").glob("*.py"):
        fla_imports = starting(imports(path), "fla.")
        assert fla_imports == starting(fla_imports, "fla.ops.common"), path


def test_textbooks_import_torch_only():
    for path in (ROOT / "ops").rglob("naive.py"):
        names = {name.split(".")[0] for name in imports(path)} - {"__future__"}
        allowed = {"torch", "typing", "collections"} | ({"fla"} if _face_of(path) else set())
        assert names <= allowed, (path, names)


def _face_of(path: Path) -> bool:
    """The textbook of a thin face may lean on that of its engine."""
    return path.parent.name not in ENGINES and not (
        starting(imports(path), "fla.") - starting(imports(path), "fla.ops.attn.naive")
    )


def test_kernels_never_import_faces():
    """Neither from where they are nor from where they are exported."""
    for path in modules():
        names = imports(path)
        if starting(names, "triton") or path.match("triton.py") or path.match("hopper*.py"):
            within = {name.rpartition(".")[0] for name in names}
            assert not FACES & (names | within), path
            assert not {name for name in starting(names, "fla.ops") if is_public(name)}, path


def test_kernels_are_launched_in_one_way():
    """Which leaves launches out while a call gathers those that it lacks, and finds their GPU."""
    for path in ROOT.rglob("*.py"):
        launched = {
            ast.unparse(node.func.value)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        }
        kernels = {name for name in launched if name.endswith("kernel")}
        assert kernels == ({"kernel"} if path.name == "launch.py" else set()), path


def is_public(name: str) -> bool:
    return name.rpartition(".")[2] in fla.ops.__all__


def test_thin_faces_import_the_engines_public_functions():
    for package in ("linear_attn", "lightning_attn", "forgetting_attn"):
        for path in (ROOT / "ops" / package).glob("*.py"):
            for name in starting(imports(path), *(f"fla.ops.{engine}" for engine in ENGINES)):
                engine = re.fullmatch(r"fla\.ops\.\w+\.engine\.(?!_)[a-z_]+", name)
                assert engine or is_public(name) or ".naive.naive_" in name, (path, name)


def test_operators_import_no_modules_and_no_layers():
    for path in (ROOT / "ops").rglob("*.py"):
        assert not starting(imports(path), "fla.modules", "fla.layers"), path


def test_modules_stand_on_the_hall():
    for path in (ROOT / "modules").rglob("*.py"):
        fla_imports = starting(imports(path), "fla.")
        assert fla_imports == starting(fla_imports, "fla.modules.", "fla.ops.common."), path


def test_layers_stand_on_public_operators():
    """And on what ``fla.modules`` exports; of the hall they take the contract, for their errors."""
    lines = SIGNATURES.strip().splitlines()
    public = {line.split("(")[0].replace(": ", ".") for line in lines}
    public |= {f"fla.modules.{name}" for name in fla.modules.__all__}
    for path in (ROOT / "layers").glob("*.py"):
        others = {
            name
            for name in starting(imports(path), "fla.") - public
            if not name.startswith(("fla.layers.", "fla.ops.utils.index."))
        }
        assert others <= {"fla.ops.common.contract"}, path


def test_textbooks_come_without_triton():
    triton_free = [path for path in modules() if path.name.startswith(("engine", "eager", "naive"))]
    assert triton_free
    for path in triton_free:
        assert not starting(imports(path), "triton"), path


def names_of_modules() -> list[str]:
    """All but kernels, and the modules that put kernels together, which dispatch loads by need."""
    paths = [
        path
        for path in modules()
        if path.name not in {"triton.py", "hopper.py", "launches.py"}
        and not starting(imports(path), "triton")
    ]
    relative = (path.relative_to(ROOT.parent).with_suffix("") for path in paths)
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in relative)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_everything_imports_without_triton_and_asks_no_device():
    """Also in a process where a query of CUDA would fail."""
    imported = "\n".join(f"importlib.import_module({name!r})" for name in names_of_modules())
    run(f"""
import importlib, sys, torch
sys.modules["triton"] = None
def refuse(*_, **__): raise SystemExit("a device was asked for")
torch.cuda._lazy_init = torch.cuda.device_count = torch.cuda.is_available = refuse
{imported}
""")


def test_import_costs_little():
    """Beyond torch's own; processor time, since the machine does other things too."""
    code = """
import time, torch
start = time.process_time()
import fla.ops
print(time.process_time() - start)
"""
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_there_is_a_version():
    assert tuple(map(int, fla.__version__.split(".")[:2])) >= (1, 0)


SIGNATURES = """
fla.ops.simple_gla: chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_size=None)
fla.ops.simple_gla: fused_chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None)
fla.ops.simple_gla: fused_recurrent_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, reverse=False, state_v_first=False, cu_seqlens=None, *, transpose_state_layout=None)
fla.ops.simple_gla: parallel_simple_gla(q, k, v, g=None, scale=None, output_attentions=False, cu_seqlens=None, cu_seqlens_cpu=None)
fla.ops.simple_gla.naive: naive_recurrent_simple_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=True)
fla.ops.simple_gla.naive: naive_chunk_simple_gla(q, k, v, g, initial_state=None, output_final_state=False, chunk_size=64, scale=None)
fla.ops.simple_gla.naive: naive_parallel_simple_gla(q, k, v, g, scale=None)
fla.ops.linear_attn: chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True, cu_seqlens=None)
fla.ops.linear_attn: fused_chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True, cu_seqlens=None)
fla.ops.linear_attn: fused_recurrent_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, reverse=False, normalize=False, cu_seqlens=None)
fla.ops.linear_attn.naive: naive_recurrent_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=False)
fla.ops.linear_attn.naive: naive_chunk_linear_attn(q, k, v, scale=None, normalize=False)
fla.ops.linear_attn.utils: normalize_output(q, k, o)
fla.ops.linear_attn.utils: normalize_with_z_state(o, q, k, scale, z_init, reverse, cu_seqlens)
fla.ops.lightning_attn: chunk_lightning_attn(q, k, v, layer_idx, num_layers, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, chunk_size=None)
fla.ops.lightning_attn: fused_recurrent_lightning_attn(q, k, v, layer_idx, num_layers, scale=None, initial_state=None, output_final_state=False, reverse=False, cu_seqlens=None)
fla.ops.attn: parallel_attn(q, k, v, g=None, scale=None, window_size=None, cu_seqlens=None, chunk_indices=None, *, sink_bias=None)
fla.ops.attn: naive_parallel_attn(q, k, v, scale=None, window_size=None, causal=True, *, g=None, sink_bias=None)
fla.ops.attn.decoding: attn_decoding_one_step(q, k, v, g=None, scale=None, cu_seqlens=None, do_gate_scale=False, *, window_size=None, sink_bias=None)
fla.ops.attn.naive: naive_attn_decoding(q, k, v, g=None, scale=None, cu_seqlens=None, do_gate_scale=False, *, window_size=None, sink_bias=None)
fla.ops.forgetting_attn: parallel_forgetting_attn(q, k, v, g, scale=None, window_size=None, cu_seqlens=None)
fla.ops.forgetting_attn.naive: naive_forgetting_attn(q, k, v, g, scale=None, window_size=None)
fla.ops.kda: chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, *, A_log=None, dt_bias=None, chunk_size=64, transpose_state_layout=None)
fla.ops.kda: fused_recurrent_kda(q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None, state_v_first=False, cu_seqlens=None, *, transpose_state_layout=None)
fla.ops.kda.fused_recurrent: fused_recurrent_kda_fwd(q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, scale=None, output_final_state=False, inplace_final_state=True, state_v_first=False, cu_seqlens=None, ssm_state_indices=None, num_accepted_tokens=None, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None, out=None)
fla.ops.kda.naive: naive_recurrent_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False)
fla.ops.kda.naive: naive_chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, chunk_size=64)
fla.ops.kda.gate: fused_kda_gate(g, A_log=None, dt_bias=None, lower_bound=None, output_dtype=torch.float32)
fla.ops.kda.gate: naive_kda_gate(g, A_log, dt_bias=None, output_dtype=torch.float32)
fla.ops.kda.gate: naive_kda_lowerbound_gate(g, A_log=None, dt_bias=None, lower_bound=-5.0, output_dtype=torch.float32)
"""  # noqa: E501


CONSTRUCTORS = """
fla.modules.l2norm: l2norm(x, eps=1e-06, output_dtype=None)
fla.modules.l2norm: L2Norm(eps=1e-06, output_dtype=None)
fla.modules: FusedRMSNormGated(hidden_size, elementwise_affine=True, eps=1e-05, activation='swish', device=None, dtype=None)
fla.modules: ShortConvolution(hidden_size, kernel_size, bias=False, activation='silu', backend='triton', device=None, dtype=None)
fla.modules: RotaryEmbedding(dim, base=10000.0, interleaved=False)
fla.layers: LinearAttention(mode='chunk', hidden_size=1024, expand_k=1.0, expand_v=1.0, num_heads=8, num_kv_heads=None, feature_map='elementwise_product', tie_feature_map_qk=False, output_norm='rmsnorm', norm_q=False, norm_k=False, do_feature_map_norm=False, elementwise_affine=True, norm_eps=1e-05, layer_idx=None)
fla.layers: SimpleGatedLinearAttention(mode='chunk', hidden_size=1024, expand_k=1.0, expand_v=1.0, num_heads=4, num_kv_heads=None, use_short_conv=True, conv_size=4, conv_bias=False, gate_fn='swish', elementwise_affine=True, norm_eps=1e-05, gate_logit_normalizer=16, fuse_norm=True, layer_idx=None)
fla.layers: LightningAttention(mode='chunk', hidden_size=1024, expand_k=1.0, expand_v=1.0, num_heads=8, num_kv_heads=None, use_short_conv=False, conv_size=4, conv_bias=False, gate_fn='sigmoid', elementwise_affine=True, norm_eps=1e-05, layer_idx=None, num_layers=None)
fla.layers: ForgettingAttention(hidden_size=2048, num_heads=32, num_kv_heads=None, qkv_bias=False, qk_norm=False, window_size=None, use_output_gate=False, layer_idx=None)
fla.layers: Attention(hidden_size=2048, num_heads=32, num_kv_heads=None, qkv_bias=False, qk_norm=False, window_size=None, rope_theta=10000.0, max_position_embeddings=None, layer_idx=None)
fla.layers: KimiDeltaAttention(hidden_size=2048, expand_v=1, head_dim=128, num_heads=16, num_v_heads=None, mode='chunk', use_short_conv=True, allow_neg_eigval=False, safe_gate=False, lower_bound=None, conv_size=4, conv_bias=False, layer_idx=None, norm_eps=1e-05)
"""  # noqa: E501
CALLS = (SIGNATURES + CONSTRUCTORS).split("\n")


@pytest.mark.parametrize("line", [line for line in CALLS if line], ids=lambda x: x.split("(")[0])
def test_signatures(line):
    """Names, order and defaults are what programs rely on."""
    module, signature = line.split(": ")
    name, _, parameters = signature.partition("(")
    function = getattr(__import__(module, fromlist=[name]), name)
    found = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in found.parameters.values()
    ]
    assert str(inspect.Signature(bare)) == f"({parameters}"


def test_ops_exports_every_operator():
    named = [line.split(": ")[1].split("(")[0] for line in SIGNATURES.strip().splitlines()]
    public = {
        name
        for line, name in zip(SIGNATURES.strip().splitlines(), named, strict=True)
        if "naive" not in name and "utils" not in line
    }
    assert public == set(fla.ops.__all__)
    assert all(callable(getattr(fla.ops, name)) for name in fla.ops.__all__)
    assert torch.ops.fla.linear_forward is not None
