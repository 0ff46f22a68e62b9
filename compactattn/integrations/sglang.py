"""Run SGLang's models on compactattn (extra `sglang`, SGLang 0.5.23).

    pip install '.[sglang]'  # in a checkout
    sglang serve --model-path MODEL --attention-backend compactattn \
        --json-model-override-args '{"compactattn": {"alpha": 0.18}}'

`register` is an entry point of `sglang.srt.plugins`: SGLang calls it in each of its processes, before it reads its
arguments. The settings are those of `compactattn.integrations.engine_settings`; docs/sglang.md says what they do. What
cannot run is refused by name: arguments while SGLang resolves them, layers when the backend is made, which is before
the server answers.

As the backend of everything (`--attention-backend`), decode rows and contexts of at most `dense_keys` tokens attend to
every block, exactly; other chunks of a prompt run `prefill` with key means that are kept beside the cache, by physical
page. As the backend of prefill alone (`--prefill-attention-backend`), pages are filled by another backend too, so no
means are kept: each chunk makes those of its request's past anew.

Facts about SGLang that this file relies on: with a page size above 1 a token stands at slot page * page_size + place,
at the same place in its page as in its request, and prefixes are shared by whole pages; page 0 is nobody's and takes
what padding writes; the backend writes the step's keys and values itself, unless the model has done so; of the metadata
calls, `init_forward_metadata_out_graph` runs in every step and outside of captured graphs; attention runs eagerly
between the pieces of a breakable prefill graph. Who else fills pages (hierarchical caches, transfers, drafts that are
moved once they are accepted) is refused, and so are pools of another class; beams, which share the page that they part
in, SGLang itself refuses with pages of more than one token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from compactattn.data import KVSummary
from compactattn.integrations.engine_settings import (
    EngineSettings,
    check_dtypes,
    check_layer,
    check_refused,
    own_object,
    page_sizes,
    parse_settings,
)
from compactattn.integrations.engine_steps import LayerPlan, Step, StepPlanner
from compactattn.validation import fail

try:
    from sglang.srt.arg_groups.overrides import attention_backends_of, declare_resolution, resolved_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
except ImportError as error:
    needed = "compactattn.integrations.sglang needs SGLang 0.5.23, the extra `sglang`: pip install '.[sglang]'"
    raise ImportError(needed) from error

NAME = "compactattn"
KEY = "compactattn"  # of the object in --json-model-override-args
PREFERRED_PAGE = 128  # tokens: a page of one KV block, whose means take under 1 % of the cache

logger = logging.getLogger(__name__)

#: arguments of the server with the values that can run, others being refused: who else fills pages, moves tokens in
#: them or cuts requests up in ways of its own
ARGUMENTS: Mapping[str, tuple[object, ...]] = {
    "speculative_algorithm": (None,),
    "decoupled_spec_role": ("null",),
    "kv_cache_dtype": ("auto", "bf16", "bfloat16"),
    "enable_hierarchical_cache": (False,),
    "enable_lmcache": (False,),
    "enable_flexkv": (False,),
    "enable_hisparse": (False,),
    "enable_unified_memory": (False,),
    "enable_unified_cache_external_linker": (False,),
    "enable_page_major_kv_layout": (False,),
    "enable_kv_cache_sharding": (False,),
    "radix_cache_backend": (None,),
    "prefill_only_disable_kv_cache": (False,),
    "disaggregation_mode": ("null",),
    "enable_pd_role_switch": (False,),
    "enable_pdmux": (False,),
    "enable_two_batch_overlap": (False,),
    "enable_mis": (False,),
    "dllm_algorithm": (None,),
    "attn_dp_size": (1,),
    "attn_cp_size": (1,),
    "dcp_size": (1,),
}


def register() -> None:
    """Make the backend known to this process: its name on the command line, its arguments' checks and its class."""
    if NAME in ATTENTION_BACKENDS:
        return
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_resolution_hook("handle_attention_backend_compatibility")(resolve_arguments)
    register_attention_backend(NAME)(CompactAttentionBackend)


def settings_of(server_args: Any) -> EngineSettings:
    """The plugin's settings in SGLang's arguments."""
    where = "--json-model-override-args"
    try:
        overrides = json.loads(server_args.json_model_override_args)
    except json.JSONDecodeError as error:
        raise fail(where, "a JSON object", repr(server_args.json_model_override_args)) from error
    if not isinstance(overrides, Mapping):
        raise fail(where, f"a JSON object, in it an object {KEY!r}", type(overrides).__name__)
    return parse_settings(own_object(overrides, KEY, where, alone=False), f"{where}: {KEY}")


def resolve_arguments(server_args: Any, previous: Callable[[Any], None]) -> None:
    """SGLang's own step for attention backends, then ours: settings, refusals and the size of pages.

    Raises:
        ValueError: naming the argument or setting, what can run and what came.
    """
    previous(server_args)
    view = resolved_view(server_args)
    prefills, decodes = attention_backends_of(view)
    if NAME not in (prefills, decodes):
        return
    if prefills != NAME:
        expected = f"another backend beside --prefill-attention-backend {prefills} ({NAME} decodes what it prefills)"
        raise fail("--decode-attention-backend", expected, NAME)
    settings = settings_of(server_args)
    check_split(settings, decodes)
    for name, valid in ARGUMENTS.items():
        value = getattr(view, name)
        if value not in valid:
            words = " or ".join(str(word) for word in valid)
            raise fail(f"--{name.replace('_', '-')}", f"{words} with --attention-backend {NAME}", value)
    if view.cuda_graph_config.prefill.backend == Backend.FULL:
        expected = f"{Backend.BREAKABLE} or {Backend.DISABLED} with --attention-backend {NAME}"
        raise fail("--cuda-graph-backend-prefill", expected, Backend.FULL)
    sizes = page_sizes(settings.others.block_size)
    if view.page_size is None:
        declare_resolution(server_args, NAME, page_size=min(PREFERRED_PAGE, sizes[-1]))
    elif view.page_size not in sizes:
        words = ", ".join(map(str, sizes))
        raise fail("--page-size", f"one of {words} (for block_size {settings.others.block_size})", view.page_size)


def check_split(settings: EngineSettings, decodes: str) -> None:
    """Refuse the mean correction where another backend decodes: it lives on means that are kept."""
    if settings.correction and decodes != NAME:
        raise fail("correction", f"false beside another decode backend ({decodes})", settings.correction)


class CompactAttentionBackend(AttentionBackend):
    """SGLang's attention backend, or its half for prefill: plans each step once, runs it layer by layer.

    Raises:
        ValueError: a layer, a pool or a setting that cannot run, by name.
    """

    needs_cpu_seq_lens = False
    extend_dummy_seqs_capped_by_req_pool = True

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool, self.token_to_kv_pool = model_runner.req_to_token_pool, model_runner.token_to_kv_pool
        self.kv_index_translator = model_runner.kv_index_translator
        self.forward_metadata: Step | None = None
        self._settings = settings_of(model_runner.server_args)
        decodes = model_runner.decode_attention_backend_str
        check_split(self._settings, decodes)
        if model_runner.is_draft_worker:
            raise fail("speculative decoding", "none", "a draft model")
        self._page_size = self._check_pool(model_runner)
        number = model_runner.model_config.num_hidden_layers
        self._settings.check_model(num_layers=number, page_size=self._page_size)
        self._layers = self._check_layers(model_runner.model)
        self._plans: dict[int, LayerPlan] = {}
        self._summaries: dict[int, KVSummary | None] = {}
        for layer_id, layer in self._layers.items():
            plan = LayerPlan(self._settings.of_layer(layer_id), self._settings, float(layer.scaling))
            self._plans[layer_id] = plan
            self._summaries[layer_id] = plan.new_summary(self._pages(layer_id)[0]) if decodes == NAME else None
        means = sum(summary.nbytes for summary in self._summaries.values() if summary is not None)
        logger.info("compactattn runs with %s; %.0f MiB of key means", self._settings, means / 2**20)
        longest, chunk = self.req_to_token_pool.req_to_token.shape[1], model_runner.server_args.chunked_prefill_size
        chunk = chunk if chunk is not None and chunk > 0 else longest
        if (reason := self._settings.why_all_dense(chunk=chunk, longest=longest)) is not None:
            logger.warning("compactattn leaves nothing out: %s", reason)
        self._reserve(self.req_to_token_pool.size)

    def _check_pool(self, model_runner: Any) -> int:
        """Tokens per page of a plain cache; a ValueError for any other."""
        pool = self.token_to_kv_pool
        if type(pool) is not MHATokenToKVPool:
            raise fail("KV cache", "MHATokenToKVPool (no MLA, sliding-window or hybrid pool)", type(pool).__name__)
        if pool.is_quantized_kv_cache or pool.kv_cache_layout not in ("nhd", "hnd"):
            raise fail("KV cache", "an nhd or hnd layout, not quantised", pool.kv_cache_layout)
        if pool.v_head_dim != pool.head_dim:
            raise fail("head size of values", f"{pool.head_dim}, as that of keys", pool.v_head_dim)
        check_dtypes(model_runner.dtype, pool.dtype)
        page_size: int = pool.page_size
        return page_size

    def _check_layers(self, model: torch.nn.Module) -> dict[int, RadixAttention]:
        """This rank's attention layers by number, each of which can run."""
        layers: dict[int, RadixAttention] = {}
        for name, layer in model.named_modules():
            if not isinstance(layer, RadixAttention):
                continue
            causal = "cross" if layer.is_cross_attention else str(layer.attn_type.value)
            asked = {
                "sliding_window": layer.sliding_window_size if layer.sliding_window_size >= 0 else None,
                "logits_soft_cap": layer.logit_cap,
                "use_irope": layer.use_irope,
                "xai_temperature_len": layer.xai_temperature_len if layer.xai_temperature_len > 0 else None,
                "pos_encoding_mode": layer.pos_encoding_mode if layer.pos_encoding_mode != "NONE" else None,
                "kv_sharing_target_layer_name": name if layer.layer_id in layers else None,
            }
            check_layer(
                heads=layer.tp_q_head_num,
                kv_heads=layer.tp_k_head_num,
                head_size=layer.qk_head_dim,
                attention_type=causal,
                cache_dtype="auto",  # the pool's is checked
                settings=self._settings,
                others=asked,
            )
            if layer.v_head_dim != layer.qk_head_dim:
                raise fail("head size of values", f"{layer.qk_head_dim}, as that of keys", layer.v_head_dim)
            layers[layer.layer_id] = layer
        return layers

    def _reserve(self, max_requests: int) -> None:
        """Buffers for steps of so many requests; captured graphs read them, so they stay where they are."""
        device = self.req_to_token_pool.req_to_token.device
        longest = self.req_to_token_pool.req_to_token.shape[1]
        self._planner = StepPlanner(
            self._settings,
            max_requests=max_requests,
            max_seq_len=longest,
            page_size=self._page_size,
            dense_queries=1,
            heads=sorted({layer.tp_q_head_num for layer in self._layers.values()}),
            device=device,
        )
        self._starts = torch.zeros(max_requests + 1, dtype=torch.int32, device=device)
        self._one_each = torch.arange(max_requests + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(max_requests, dtype=torch.int32, device=device)
        pages = -(-longest // self._page_size)
        self._page_table = torch.zeros((max_requests, pages), dtype=torch.int32, device=device)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        if max_bs > self._planner.max_requests:
            self._reserve(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Plan the step, and bring everything up to date that its kernels read; reads nothing from the device."""
        batch, mode = forward_batch, forward_batch.forward_mode
        if mode.is_idle() or batch.batch_size == 0:
            self.forward_metadata = None
            return
        if batch.spec_info is not None or not (mode.is_decode() or mode.is_extend_or_draft_extend_or_mixed()):
            raise fail("forward mode", "EXTEND, MIXED or DECODE without speculation", mode.name)
        if batch.encoder_lens is not None:
            raise fail("encoder_lens", "none (no cross attention)", "an encoder's lengths")
        requests = batch.batch_size
        if requests > self._planner.max_requests:
            raise fail("requests of a step", f"at most {self._planner.max_requests}", requests)
        longest = self._planner.max_seq_len
        if mode.is_decode():
            starts, host_starts, host_seq_lens = self._one_each[: requests + 1], list(range(requests + 1)), None
        else:
            if batch.extend_seq_lens_cpu is None or batch.extend_prefix_lens_cpu is None:
                raise fail("extend_seq_lens_cpu, extend_prefix_lens_cpu", "the host's lengths of a chunk", "None")
            q_lens = [int(n) for n in batch.extend_seq_lens_cpu[:requests]]
            host_starts = [0, *accumulate(q_lens)]
            host_seq_lens = [int(n) + q for n, q in zip(batch.extend_prefix_lens_cpu, q_lens, strict=False)]
            starts = self._starts[: requests + 1]
            torch.cumsum(batch.extend_seq_lens[:requests], 0, dtype=torch.int32, out=starts[1:])
        seq_lens = self._seq_lens[:requests].copy_(batch.seq_lens[:requests])
        page_table = self._page_table[:requests]
        first_slots = self.req_to_token_pool.req_to_token[:, :: self._page_size]
        torch.index_select(first_slots, 0, batch.req_pool_indices[:requests], out=page_table)
        page_table.div_(self._page_size, rounding_mode="floor")
        self.forward_metadata = self._planner.plan(
            query_starts=starts,
            seq_lens=seq_lens,
            page_table=page_table,
            host_starts=host_starts,
            host_seq_lens=host_seq_lens,
            max_seq_len=longest,
        )

    def _pages(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer's cache, each a view [pages, page_size, Hkv, D]."""
        pool = self.token_to_kv_pool
        k, v = pool.get_kv_buffer(layer_id)
        if pool.kv_cache_layout == "hnd":
            return k.transpose(1, 2), v.transpose(1, 2)
        shape = (k.shape[0] // self._page_size, self._page_size)
        rows = shape[0] * shape[1]
        return k[:rows].unflatten(0, shape), v[:rows].unflatten(0, shape)

    @torch.compiler.disable
    def _forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **others: Any,
    ) -> Tensor:
        """Attention of one layer: q [T, Hq * D] or [T, Hq, D], k and v [T, Hkv, D]; returns [T, Hq * D].

        Rows beyond the step's queries are padding and come back 0.
        """
        check_refused(others)
        number = layer.layer_id
        if number not in self._layers or self._layers[number] is not layer:
            raise fail("layer", "an attention layer that the model had when the backend was made", number)
        step = self.forward_metadata
        if step is None:
            raise fail("forward_metadata", "a planned step (init_forward_metadata)", "None")
        if save_kv_cache and k is not None:
            where = KVWriteLoc.for_batch(forward_batch)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty(queries.shape, dtype=q.dtype, device=q.device)
        out[step.runs[-1].rows.stop if step.runs else 0 :].zero_()
        self._plans[number].run(queries, *self._pages(number), step, self._summaries[number], out)
        return out.view(len(queries), -1)

    forward_extend = _forward
    forward_decode = _forward
