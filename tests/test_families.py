"""The skeleton on every family of decoders: which linears it finds, and that its blocks are those of transformers."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.skeleton import BlockInputs, Prunable, Skeleton, open_skeleton

H, F, V = 32, 48, 96
"""Hidden size, neurons of an MLP, vocabulary."""


@dataclass(frozen=True)
class Family:
    """A tiny model, and what must be found in its blocks, written from the architecture's paper or code."""

    architecture: str
    config: dict[str, Any]
    linears: dict[str, tuple[int, int]]
    """Name inside a block -> (out, in), in any order; braces for numbers of experts."""
    roles: dict[str, str] = field(default_factory=dict)
    """Name inside a block -> role, where that is not `other`."""
    n_blocks: int = 2
    is_fused: bool = False
    not_in_block_0: tuple[str, ...] = ()


def base(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": H,
        "intermediate_size": F,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": V,
        "max_position_embeddings": 64,
        **changes,
    }


ATTENTION = {
    "self_attn.q_proj": (H, H),
    "self_attn.k_proj": (16, H),
    "self_attn.v_proj": (16, H),
    "self_attn.o_proj": (H, H),
}
MLP = {"mlp.gate_proj": (F, H), "mlp.up_proj": (F, H), "mlp.down_proj": (H, F)}
MLP_ROLES = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
OPT = {
    **{f"self_attn.{name}": (H, H) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "fc1": (F, H),
    "fc2": (H, F),
}


def opt(**changes: Any) -> dict[str, Any]:
    return {**base(), "ffn_dim": F, "word_embed_proj_dim": H, **changes}


def experts(prefix: str, shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Four of each; `*` is the number."""
    return {f"{prefix}.{name.replace('*', str(i))}": shape for i in range(4) for name, shape in shapes.items()}


def expert_roles(prefix: str, roles: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name.replace('*', str(i))}": role for i in range(4) for name, role in roles.items()}


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN_EXPERT = {"*.gate_proj": (24, H), "*.up_proj": (24, H), "*.down_proj": (H, 24)}
QWEN_EXPERT_ROLES = {"*.gate_proj": "gate", "*.up_proj": "up", "*.down_proj": "down"}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}

FAMILIES = {
    "llama": Family("Llama", base(), {**ATTENTION, **MLP}, MLP_ROLES),
    "mistral": Family("Mistral", base(sliding_window=5), {**ATTENTION, **MLP}, MLP_ROLES),
    "qwen2": Family("Qwen2", base(tie_word_embeddings=True), {**ATTENTION, **MLP}, MLP_ROLES),
    "qwen3": Family("Qwen3", base(), {**ATTENTION, **MLP}, MLP_ROLES),
    "gemma2": Family("Gemma2", base(sliding_window=5, **ALTERNATING), {**ATTENTION, **MLP}, MLP_ROLES, n_blocks=3),
    "gemma3": Family(
        "Gemma3",
        base(sliding_window=5, rope_local_base_freq=100.0, **ALTERNATING),
        {**ATTENTION, **MLP},
        MLP_ROLES,
        n_blocks=3,
    ),
    "phi3": Family(
        "Phi3",
        base(pad_token_id=0),
        {
            "self_attn.qkv_proj": (H + 16 + 16, H),
            "self_attn.o_proj": (H, H),
            "mlp.gate_up_proj": (2 * F, H),
            "mlp.down_proj": (H, F),
        },
        {"mlp.gate_up_proj": "gate_up", "mlp.down_proj": "down"},
    ),
    "opt": Family("OPT", opt(), OPT),
    "opt-350m": Family("OPT", opt(word_embed_proj_dim=16, do_layer_norm_before=False), OPT),
    "gpt2": Family(
        "GPT2",
        {"n_embd": H, "n_layer": 3, "n_head": 4, "n_inner": F, "vocab_size": V, "n_positions": 64},
        {"attn.c_attn": (3 * H, H), "attn.c_proj": (H, H), "mlp.c_fc": (F, H), "mlp.c_proj": (H, F)},
        n_blocks=3,
    ),
    "gpt-neox": Family(
        "GPTNeoX",
        base(use_parallel_residual=True),
        {
            "attention.query_key_value": (3 * H, H),
            "attention.dense": (H, H),
            "mlp.dense_h_to_4h": (F, H),
            "mlp.dense_4h_to_h": (H, F),
        },
    ),
    "bloom": Family(
        "Bloom",
        {"hidden_size": H, "n_layer": 3, "n_head": 4, "vocab_size": V},
        {
            "self_attention.query_key_value": (3 * H, H),
            "self_attention.dense": (H, H),
            "mlp.dense_h_to_4h": (4 * H, H),
            "mlp.dense_4h_to_h": (H, 4 * H),
        },
        n_blocks=3,
    ),
    "falcon": Family(  # 7B: parallel attention, one head of keys and values
        "Falcon",
        {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V, "ffn_hidden_size": F},
        {
            "self_attention.query_key_value": (H + 8 + 8, H),
            "self_attention.dense": (H, H),
            "mlp.dense_h_to_4h": (F, H),
            "mlp.dense_4h_to_h": (H, F),
        },
    ),
    "falcon-new": Family(  # 40B
        "Falcon",
        {
            **{"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V},
            **{"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": F},
        },
        {
            "self_attention.query_key_value": (H + 16 + 16, H),
            "self_attention.dense": (H, H),
            "mlp.dense_h_to_4h": (F, H),
            "mlp.dense_4h_to_h": (H, F),
        },
    ),
    "falcon-alibi": Family(  # RW-1B
        "Falcon",
        {
            **{"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V, "alibi": True},
            **{"parallel_attn": False, "multi_query": False, "bias": True, "ffn_hidden_size": F},
        },
        {
            "self_attention.query_key_value": (3 * H, H),
            "self_attention.dense": (H, H),
            "mlp.dense_h_to_4h": (F, H),
            "mlp.dense_4h_to_h": (H, F),
        },
    ),
    "mixtral": Family(
        "Mixtral",
        base(num_local_experts=4),
        {**ATTENTION, **experts("block_sparse_moe.experts", {"*.w1": (F, H), "*.w3": (F, H), "*.w2": (H, F)})},
        expert_roles("block_sparse_moe.experts", {"*.w1": "gate", "*.w3": "up", "*.w2": "down"}),
    ),
    "qwen2-moe": Family(
        "Qwen2Moe",
        base(**MOE, shared_expert_intermediate_size=40),
        {
            **ATTENTION,
            **experts("mlp.experts", QWEN_EXPERT),
            "mlp.shared_expert.gate_proj": (40, H),
            "mlp.shared_expert.up_proj": (40, H),
            "mlp.shared_expert.down_proj": (H, 40),
        },
        {
            **expert_roles("mlp.experts", QWEN_EXPERT_ROLES),
            "mlp.shared_expert.gate_proj": "gate",
            "mlp.shared_expert.up_proj": "up",
            "mlp.shared_expert.down_proj": "down",
        },
    ),
    "qwen3-moe": Family(
        "Qwen3Moe",
        base(**MOE, decoder_sparse_step=1),
        {**ATTENTION, **experts("mlp.experts", QWEN_EXPERT)},
        expert_roles("mlp.experts", QWEN_EXPERT_ROLES),
    ),
    "glm4-moe": Family(  # its router has a buffer that is in the checkpoint
        "Glm4Moe",
        base(**{**MOE, "n_routed_experts": 4}, first_k_dense_replace=0, n_shared_experts=1, n_group=1, topk_group=1),
        {
            **ATTENTION,
            **experts("mlp.experts", QWEN_EXPERT),
            "mlp.shared_experts.gate_proj": (24, H),
            "mlp.shared_experts.up_proj": (24, H),
            "mlp.shared_experts.down_proj": (H, 24),
        },
        {
            **expert_roles("mlp.experts", QWEN_EXPERT_ROLES),
            "mlp.shared_experts.gate_proj": "gate",
            "mlp.shared_experts.up_proj": "up",
            "mlp.shared_experts.down_proj": "down",
        },
    ),
    "granite-moe": Family(
        "GraniteMoe",
        base(num_local_experts=4),
        {
            **ATTENTION,
            **experts("block_sparse_moe", {"input_linear.*": (2 * F, H), "output_linear.*": (H, F)}),
        },
        expert_roles("block_sparse_moe", {"input_linear.*": "gate_up", "output_linear.*": "down"}),
        is_fused=True,
    ),
    "llama4": Family(
        "Llama4",
        base(
            **{"intermediate_size_mlp": 40, "num_local_experts": 4, "interleave_moe_layer_step": 1},
            **{"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8, "pad_token_id": 0},
        ),
        {
            **ATTENTION,
            **experts("feed_forward.experts", {"gate_up_proj.*": (2 * F, H), "down_proj.*": (H, F)}),
            "feed_forward.shared_expert.gate_proj": (F, H),
            "feed_forward.shared_expert.up_proj": (F, H),
            "feed_forward.shared_expert.down_proj": (H, F),
        },
        {
            **expert_roles("feed_forward.experts", {"gate_up_proj.*": "gate_up", "down_proj.*": "down"}),
            "feed_forward.shared_expert.gate_proj": "gate",
            "feed_forward.shared_expert.up_proj": "up",
            "feed_forward.shared_expert.down_proj": "down",
        },
        n_blocks=4,
        is_fused=True,
    ),
    "gpt-oss": Family(  # rows of gate and up alternate: no role says so
        "GptOss",
        base(num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
        {**ATTENTION, **experts("mlp.experts", {"gate_up_proj.*": (2 * F, H), "down_proj.*": (H, F)})},
        is_fused=True,
    ),
}

TIED = ("qwen2", "gemma2", "gemma3", "opt", "opt-350m", "gpt2", "bloom", "falcon", "falcon-new", "falcon-alibi")


@dataclass(frozen=True)
class Saved:
    """A family's model on disk and in memory."""

    name: str
    family: Family
    folder: Path
    plain: Any
    tokens: torch.Tensor

    def open(self) -> Skeleton:
        return open_skeleton(open_checkpoint(str(self.folder)))


def save_model(family: Family, folder: Path) -> Any:
    """Save a seeded model whose every parameter and stored buffer is random, biases and norms too."""
    config_class = "Gemma3TextConfig" if family.architecture == "Gemma3" else f"{family.architecture}Config"
    config_class = "Llama4TextConfig" if family.architecture == "Llama4" else config_class
    config = getattr(transformers, config_class)(**family.config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn_like(value) * 0.2 + (1.0 if value.dim() == 1 else 0.0))
    model.save_pretrained(folder)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    name = request.param
    folder = tmp_path_factory.mktemp("family") / name
    save_model(FAMILIES[name], folder)
    # The cap on the scores of Gemma 2 is in its plain attention alone.
    options = {"attn_implementation": "eager"} if name == "gemma2" else {}
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval().requires_grad_(False)
    tokens = torch.randint(4, V, (2, 24), generator=torch.Generator().manual_seed(1))
    return Saved(name, FAMILIES[name], folder, plain, tokens)


def hidden_of(output: Any) -> torch.Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert hidden.dim() == 3
    return hidden  # type: ignore[no-any-return]


@torch.inference_mode()
def run_block(block: nn.Module, inputs: BlockInputs, index: int, i: int) -> torch.Tensor:
    args, kwargs = inputs.arguments[index]
    return hidden_of(block(inputs.hidden_states[i], *args, **kwargs))


@torch.inference_mode()
def plain_block_outputs(saved: Saved, row: torch.Tensor) -> list[torch.Tensor]:
    blocks = saved.plain.get_submodule(saved.open().prefix)
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(hidden_of(out).clone())) for block in blocks]
    saved.plain(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


@contextmanager
def seen_inputs(linears: dict[str, Prunable]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect what the module of each linear is called with."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    with ExitStack() as stack:
        for name, linear in linears.items():
            hook = linear.module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
            stack.callback(hook.remove)
        yield seen


def short(skeleton: Skeleton, index: int, name: str) -> str:
    prefix = f"{skeleton.prefix}.{index}."
    assert name.startswith(prefix)
    return name.removeprefix(prefix)


# --- What is found ------------------------------------------------------------------------------


def test_every_linear_of_every_block_is_found_and_no_other(saved: Saved) -> None:
    skeleton = saved.open()
    assert len(skeleton.blocks) == saved.family.n_blocks
    for index in range(saved.family.n_blocks):
        found = {
            short(skeleton, index, name): (linear.out_features, linear.in_features)
            for name, linear in skeleton.linears(index).items()
        }
        assert found == saved.family.linears
    n_weights = sum(rows * columns for rows, columns in saved.family.linears.values())
    assert skeleton.n_weights() == [n_weights] * saved.family.n_blocks


def test_roles_are_those_of_gated_mlps_and_group_by_mlp_or_expert(saved: Saved) -> None:
    skeleton = saved.open()
    linears = {short(skeleton, 1, name): linear for name, linear in skeleton.linears(1).items()}
    assert {name: linear.role for name, linear in linears.items() if linear.role != "other"} == saved.family.roles
    groups: dict[str, list[str]] = {}
    for linear in linears.values():
        assert (linear.mlp is None) == (linear.role == "other")
        if linear.mlp is not None:
            groups.setdefault(linear.mlp, []).append(linear.role)
    assert all(sorted(roles) in (["down", "gate", "up"], ["down", "gate_up"]) for roles in groups.values())
    assert sum(map(len, groups.values())) == len(saved.family.roles)


def test_experts_are_known_as_such(saved: Saved) -> None:
    skeleton = saved.open()
    for name, linear in skeleton.linears(0).items():
        is_routed = ".experts." in name or ("granite" in saved.name and "block_sparse_moe" in name)
        assert linear.is_expert == is_routed, name


def test_parameters_are_names_of_the_model_and_fused_experts_share_one(saved: Saved) -> None:
    skeleton = saved.open()
    parameters = dict(skeleton.model.named_parameters())
    linears = skeleton.linears(0)
    for name, linear in linears.items():
        assert parameters[linear.parameter].numel() in (linear.weight.numel(), 4 * linear.weight.numel())
        assert name in (
            linear.parameter.removesuffix(".weight"),
            f"{linear.parameter.removesuffix('.weight')}.{linear.expert}",
        )
        assert linear.parameter in skeleton.block_tensors(0)
    n_fused = sum(linear.expert is not None for linear in linears.values())
    assert n_fused == (8 if saved.family.is_fused else 0)
    assert len({linear.parameter for linear in linears.values()}) == len(linears) - n_fused + n_fused // 4


# --- What the blocks compute --------------------------------------------------------------------


def test_blocks_run_one_by_one_give_the_hidden_states_of_transformers(saved: Saved) -> None:
    skeleton = saved.open()
    inputs = skeleton.capture(saved.tokens)
    expected = [plain_block_outputs(saved, row) for row in saved.tokens]
    for index in range(len(skeleton.blocks)):
        with skeleton.filled(index) as block:
            for i in range(len(saved.tokens)):
                inputs.hidden_states[i] = run_block(block, inputs, index, i)
                torch.testing.assert_close(inputs.hidden_states[i], expected[i][index], rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for block in skeleton.blocks for parameter in block.parameters())


def test_block_leaves_its_input_and_its_arguments_as_they_were(saved: Saved) -> None:
    skeleton = saved.open()
    inputs = skeleton.capture(saved.tokens)
    assert all(type(hidden) is torch.Tensor for hidden in inputs.hidden_states)
    before = [hidden.clone() for hidden in inputs.hidden_states]
    with skeleton.filled(0) as block:
        first, again = (run_block(block, inputs, 0, 0) for _ in range(2))
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.hidden_states, strict=True))
    for args, kwargs in inputs.arguments:
        values = [*args, *kwargs.values()]
        assert not any(isinstance(value, transformers.Cache) for value in values)


def test_weight_times_input_is_what_the_linear_computes(saved: Saved) -> None:
    skeleton = saved.open()
    inputs = skeleton.capture(saved.tokens)
    linears = {name: linear for name, linear in skeleton.linears(0).items() if linear.expert is None}
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with skeleton.filled(0) as block, ExitStack() as stack:
        for name, linear in linears.items():
            hook = linear.module.register_forward_hook(
                lambda _, args, output, name=name: calls.__setitem__(name, (args[0].clone(), output.clone()))
            )
            stack.callback(hook.remove)
        run_block(block, inputs, 0, 0)
        assert calls.keys() >= {name for name, linear in linears.items() if not linear.is_expert}
        for name, (seen, output) in calls.items():
            bias = getattr(linears[name].module, "bias", None)
            expected = seen @ linears[name].weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_set_writes_what_weight_and_the_model_then_show(saved: Saved) -> None:
    skeleton = saved.open()
    stored = {name: skeleton.checkpoint.read(tensor) for name, tensor in skeleton.block_tensors(0).items()}
    linears = skeleton.linears(0)
    with skeleton.filled(0):
        generator = torch.Generator().manual_seed(2)
        new = {name: torch.randn(linear.weight.shape, generator=generator) for name, linear in linears.items()}
        for name, linear in linears.items():
            linear.set_(new[name])
        assert all(torch.equal(linear.weight, new[name]) for name, linear in linears.items())
        parameters = dict(skeleton.model.named_parameters())
        for parameter, before in stored.items():
            parts = [(name, linear) for name, linear in linears.items() if linear.parameter == parameter]
            for name, linear in parts:
                now = parameters[parameter] if linear.expert is None else parameters[parameter][linear.expert]
                assert torch.equal(now.T if linear.is_transposed else now, new[name])
            if not parts:  # biases, norms, routers
                assert torch.equal(parameters[parameter], before)


def test_weights_are_those_of_the_plain_model(saved: Saved) -> None:
    skeleton = saved.open()
    plain = dict(saved.plain.named_parameters())
    with skeleton.filled(1):
        for linear in skeleton.linears(1).values():
            value = plain[linear.parameter] if linear.expert is None else plain[linear.parameter][linear.expert]
            assert torch.equal(linear.weight, value.T if linear.is_transposed else value)


def test_tied_head_stays_the_embedding_and_is_counted_once(saved: Saved) -> None:
    skeleton = saved.open()
    head, embedding = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (saved.name in TIED)
    n_parameters = sum(parameter.numel() for parameter in skeleton.model.parameters())
    skeleton.capture(saved.tokens)
    assert (head.weight is embedding.weight) == (saved.name in TIED)
    assert head.weight.is_meta
    assert embedding.weight.is_meta  # emptied again
    assert sum(parameter.numel() for parameter in skeleton.model.parameters()) == n_parameters
    assert n_parameters == sum(parameter.numel() for parameter in saved.plain.parameters())


# --- Mixtures of experts ------------------------------------------------------------------------


def test_each_expert_sees_as_many_rows_as_tokens_were_routed_to_it(saved: Saved) -> None:
    skeleton = saved.open()
    linears = {name: linear for name, linear in skeleton.linears(0).items() if linear.is_expert}
    if not linears:
        assert not saved.family.is_fused
        return
    inputs = skeleton.capture(saved.tokens)
    with skeleton.filled(0) as block, seen_inputs(linears) as seen:
        run_block(block, inputs, 0, 0)
    n_rows: dict[str, int] = {}
    for name, calls in seen.items():
        part = linears[name].parameter.removesuffix(".weight").rpartition(".")[2]
        assert all(call.shape[1] == linears[name].in_features for call in calls)
        n_rows[part] = n_rows.get(part, 0) + sum(map(len, calls))
    n_choices = {"llama4": 1}.get(saved.name, 2)
    assert set(n_rows.values()) == {n_choices * saved.tokens.shape[1]}


def opened(name: str, folder: Path) -> tuple[Skeleton, BlockInputs, torch.Tensor]:
    save_model(FAMILIES[name], folder)
    skeleton = open_skeleton(open_checkpoint(str(folder)))
    tokens = torch.randint(4, V, (1, 24), generator=torch.Generator().manual_seed(1))
    return skeleton, skeleton.capture(tokens), tokens


def test_inputs_of_fused_experts_of_llama4_are_those_of_a_loop_over_tokens(tmp_path: Path) -> None:
    skeleton, inputs, _ = opened("llama4", tmp_path)
    linears = skeleton.linears(0)
    prefix = f"{skeleton.prefix}.0.feed_forward.experts"
    entered: list[torch.Tensor] = []
    with skeleton.filled(0) as block, seen_inputs(linears) as seen:
        mixture: Any = block.feed_forward
        hook = mixture.register_forward_pre_hook(lambda _, args: entered.append(args[0][0]))
        run_block(block, inputs, 0, 0)
        hook.remove()
        logits = entered[0] @ mixture.router.weight.T
        for expert in range(4):
            rows = [
                token * torch.sigmoid(logit[expert])
                for token, logit in zip(entered[0], logits, strict=True)
                if int(logit.argmax()) == expert
            ]
            calls = seen[f"{prefix}.gate_up_proj.{expert}"]
            assert len(calls) == bool(rows)
            if rows:
                torch.testing.assert_close(calls[0], torch.stack(rows))
                gate, up = (calls[0] @ linears[f"{prefix}.gate_up_proj.{expert}"].weight.T).tensor_split(2, dim=1)
                (neurons,) = seen[f"{prefix}.down_proj.{expert}"]
                torch.testing.assert_close(neurons, up * torch.nn.functional.silu(gate), rtol=1e-4, atol=1e-5)


def test_inputs_of_fused_experts_of_gpt_oss_are_those_of_a_loop_over_tokens(tmp_path: Path) -> None:
    skeleton, inputs, _ = opened("gpt-oss", tmp_path)
    linears = skeleton.linears(0)
    prefix = f"{skeleton.prefix}.0.mlp.experts"
    entered: list[torch.Tensor] = []
    with skeleton.filled(0) as block, seen_inputs(linears) as seen:
        mixture: Any = block.mlp
        hook = mixture.register_forward_pre_hook(lambda _, args: entered.append(args[0][0]))
        run_block(block, inputs, 0, 0)
        hook.remove()
        chosen = (entered[0] @ mixture.router.weight.T + mixture.router.bias).topk(2, dim=1).indices.tolist()
        for expert in range(4):
            # First the tokens whose first choice it is.
            rows = [entered[0][t] for choice in range(2) for t in range(24) if chosen[t][choice] == expert]
            calls = seen[f"{prefix}.gate_up_proj.{expert}"]
            assert len(calls) == bool(rows)
            if rows:
                torch.testing.assert_close(calls[0], torch.stack(rows))
                bias = mixture.experts.gate_up_proj_bias[expert]
                both = calls[0] @ linears[f"{prefix}.gate_up_proj.{expert}"].weight.T + bias
                gate, up = both[:, 0::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
                (neurons,) = seen[f"{prefix}.down_proj.{expert}"]
                torch.testing.assert_close(neurons, (up + 1) * gate * torch.sigmoid(1.702 * gate), rtol=1e-4, atol=1e-5)


def test_experts_stored_in_an_unknown_way_are_refused_by_name(tmp_path: Path) -> None:
    dbrx: Any = transformers.DbrxConfig
    config = dbrx(
        d_model=H,
        n_heads=4,
        n_layers=2,
        vocab_size=V,
        max_seq_len=64,
        ffn_config={"ffn_hidden_size": F, "moe_num_experts": 4},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    skeleton = open_skeleton(open_checkpoint(str(tmp_path)))
    with pytest.raises(UnsupportedModelError, match=r"experts\.mlp\.w1 holds experts in a way that is not known"):
        skeleton.linears(0)


# --- Arguments of blocks, names of tensors ------------------------------------------------------


def test_layers_of_gemma3_have_rotary_embeddings_and_masks_of_their_type(tmp_path: Path) -> None:
    _, inputs, _ = opened("gemma3", tmp_path)
    local, full, again = (kwargs for _, kwargs in inputs.arguments)
    assert local["attention_mask"] is not None
    assert torch.equal(local["attention_mask"], again["attention_mask"])
    assert full["attention_mask"] is None or not torch.equal(local["attention_mask"], full["attention_mask"])
    assert any(
        not torch.equal(a, b)
        for a, b in zip(local["position_embeddings_local"], full["position_embeddings_global"], strict=True)
    )


def test_blocks_of_two_classes_are_called_each_in_its_way(tmp_path: Path) -> None:
    jamba = base(num_experts=4, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, pad_token_id=0)
    family = Family("Jamba", jamba, {})
    save_model(family, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    saved = Saved("jamba", family, tmp_path, plain, torch.randint(4, V, (1, 24)))
    skeleton = saved.open()
    assert len({type(block) for block in skeleton.blocks}) == 2
    inputs = skeleton.capture(saved.tokens)
    for index, expected in enumerate(plain_block_outputs(saved, saved.tokens[0])):
        with skeleton.filled(index) as block:
            inputs.hidden_states[0] = run_block(block, inputs, index, 0)
        torch.testing.assert_close(inputs.hidden_states[0], expected, rtol=1e-5, atol=1e-5)
    second = {short(skeleton, 1, name) for name in skeleton.linears(1)}
    assert second == set(ATTENTION) | set(experts("feed_forward.experts", QWEN_EXPERT))


def test_linear_beside_experts_that_is_no_gate_is_prunable(tmp_path: Path) -> None:
    config = base(num_local_experts=4, kv_channels=8)
    save_model(Family("JetMoe", config, {}), tmp_path)
    skeleton = open_skeleton(open_checkpoint(str(tmp_path)))
    names = {short(skeleton, 0, name) for name in skeleton.linears(0)}
    assert "self_attention.kv_proj" in names  # its neighbour `experts` are those of queries and outputs
    assert not any("router" in name for name in names)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hidden_states_reach_the_last_block_with_their_batch_dimension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shapes: list[tuple[int, ...]] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__ == "_Recorder":
            shapes.append(tuple(args[0].shape))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    opened(name, tmp_path)
    hook.remove()
    assert shapes == [(1, 24, H)] * FAMILIES[name].n_blocks


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "falcon", "gpt-neox"])
def test_checkpoint_of_the_base_model_alone_has_shorter_names(tmp_path: Path, name: str) -> None:
    model = save_model(FAMILIES[name], tmp_path / "whole")
    base_prefix = f"{model.base_model_prefix}."
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    assert sum(key.startswith(base_prefix) for key in tensors) >= len(tensors) - 1
    shutil.copytree(tmp_path / "whole", tmp_path / "short")
    shorter = {key.removeprefix(base_prefix): value for key, value in tensors.items()}
    save_file(shorter, tmp_path / "short" / "model.safetensors", metadata={"format": "pt"})
    skeleton = open_skeleton(open_checkpoint(str(tmp_path / "short")))
    names = skeleton.block_tensors(0)
    assert all(parameter == base_prefix + tensor for parameter, tensor in names.items())
    with skeleton.filled(0):
        assert all(
            torch.equal(value, shorter[names[key]]) for key, value in skeleton.model.named_parameters() if key in names
        )


def test_masks_that_old_checkpoints_store_do_no_harm(tmp_path: Path) -> None:
    save_model(FAMILIES["gpt2"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {f"transformer.h.{i}.attn.bias": torch.zeros(1, 1, 64, 64) for i in range(3)}
    save_file({**tensors, **masks}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    skeleton = open_skeleton(open_checkpoint(str(tmp_path)))
    with skeleton.filled(0) as block:
        computed: Any = block.attn
        assert computed.bias.sum() == 64 * 65 // 2  # the model's own lower triangle


def test_buffer_that_the_checkpoint_has_is_read(tmp_path: Path) -> None:
    model = save_model(FAMILIES["glm4-moe"], tmp_path)
    skeleton = open_skeleton(open_checkpoint(str(tmp_path)))
    with skeleton.filled(1) as block:
        gate, router = (owner.get_submodule("mlp.gate") for owner in (block, model.model.layers[1]))
        assert torch.equal(gate.get_buffer("e_score_correction_bias"), router.get_buffer("e_score_correction_bias"))


def test_untied_head_that_the_checkpoint_lacks_is_an_error(tmp_path: Path) -> None:
    save_model(FAMILIES["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"no tensor for lm_head\.weight"):
        open_skeleton(open_checkpoint(str(tmp_path)))


def test_weight_of_another_shape_or_for_an_empty_block_is_refused(tmp_path: Path) -> None:
    save_model(FAMILIES["gpt2"], tmp_path)
    skeleton = open_skeleton(open_checkpoint(str(tmp_path)))
    linear = skeleton.linears(0)["transformer.h.0.mlp.c_fc"]
    with pytest.raises(ValueError, match="empty block"):
        linear.set_(torch.zeros(F, H))
    with skeleton.filled(0), pytest.raises(ValueError, match=r"takes \(48, 32\) in a filled block, got \(1, 32\)"):
        linear.set_(torch.zeros(1, H))
