"""One engine in a process of its own: reads an order, starts vLLM, asks, and writes what came.

    python -m benchmarks.serving.engine ORDER.json ANSWER.json

`benchmarks.serving.run` starts it. vLLM is imported here and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import reason
from benchmarks.files import write_json
from benchmarks.serving.cases import BASELINE, PLUGIN, EngineCase, engine_arguments
from benchmarks.testbed.tasks import END
from benchmarks.ttft.models import ModelShape
from compactattn.integrations import engine_steps

WANTED = (0.05, 0.2)  # density of a selection on random weights whose queries and keys are scaled
SEARCH = (1.0, 1e8, 8)  # factors of queries and keys to look between, and how many are tried
REPEATS, PLENTY = 3, 30.0  # times that a length is timed; no more of them once they took so many seconds together
CHECKED = ((8192, 4), (32768, 2))  # prompts of the timed model whose tokens are kept: (length, how many)
CHECKED_TOKENS = 8
TAIL = 4000  # characters of a traceback

Told = dict[str, Any]


def main(order: Path, answer: Path) -> None:
    """Write {"engine": …, …} of what was asked, or {"reason": …, "traceback": …}; the process ends here."""
    asked = json.loads(order.read_text())
    _end_with(asked["parent"])
    try:
        told = answered(asked)
    except BaseException as error:  # pytest's skip, where another platform was found, is no Exception
        told = {"reason": reason(error), "traceback": traceback.format_exc()[-TAIL:]}
    write_json(answer, told)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing of an engine, of NCCL or of a broken CUDA context may hold the process


def _end_with(parent: int) -> None:
    """No engine stays on the GPU when the run that started it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def answered(order: Told) -> Told:
    """What an order asks for: {"case", "device", "stand_ins", "weights", "prompts", "shared"} in, see `run`."""
    case = EngineCase(**{name: _untupled(name, value) for name, value in order["case"].items()})
    started = time.perf_counter()
    missing = _prepare(order["device"], stand_ins=order["stand_ins"])
    with tempfile.TemporaryDirectory() as folder:
        model = order["weights"] if case.kind == "answers" else write_config(case.shape, case.dtype, Path(folder))
        engine = Engine(case, model, stand_ins=order["stand_ins"], device=order["device"])
    told = {"engine": engine.facts() | {"missing_modules": missing, "start_s": time.perf_counter() - started}}
    if case.kind == "answers":
        return told | speak(engine, order["prompts"], order["shared"])
    return told | time_prompts(engine)


def _untupled(name: str, value: Any) -> Any:
    return tuple(value) if name in ("lengths", "tasks") else value


def _prepare(device: str, *, stand_ins: bool) -> list[str]:
    """Make vLLM ready to be imported, and the plugin known to it; the compiled modules that it lacks."""
    missing = []
    if device == "cpu":
        from tests.vllm.cpu import use_cpu

        use_cpu()
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        # On the CPU vLLM takes its backend CPU_ATTN, so that is the name under which the plugin's stands there. And it
        # looks through every loaded module for Triton kernels, and takes what llvmlite has there for a namespace.
        register_backend(AttentionBackendEnum.CPU_ATTN, "compactattn.integrations.vllm.CompactAttentionBackend")
        sys.modules.pop("llvmlite.binding.ffi", None)
    elif stand_ins:
        from tests.vllm import gpu

        gpu.install()
        missing = gpu.missing()
    from compactattn.integrations.vllm import register

    register()
    return missing


def write_config(shape: ModelShape, dtype: str, folder: Path) -> Path:
    """A directory that vLLM takes for a model: config.json alone; the weights are to be made up."""
    told = shape.config().to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


class Engine:
    """vLLM's engine of one case.

    Args:
        case: what it is made from.
        model: directory of the model.
        stand_ins: its compiled modules are not there.
        device: "cuda" or "cpu".
    """

    def __init__(self, case: EngineCase, model: Path | str, *, stand_ins: bool, device: str) -> None:
        from vllm import LLM

        self.case, self.device = case, device
        self.model = Path(model).name if case.kind == "answers" else "config.json alone"  # no path of this machine
        positions = json.loads(Path(model, "config.json").read_text())["max_position_embeddings"]
        self.arguments = engine_arguments(case, model, positions=positions, stand_ins=stand_ins)
        self.backend = "TRITON_ATTN" if case.contestant == BASELINE else PLUGIN
        if device == "cpu":
            self.backend = "CPU_ATTN"
            self.arguments["compilation_config"]["custom_ops"] = ["none"]
        self.llm = LLM(**self.arguments, attention_backend=self.backend)

    def facts(self) -> Told:
        """What vLLM made of the arguments."""
        import vllm

        core = self.llm.llm_engine.engine_core.engine_core
        config = self.llm.llm_engine.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        return {
            "vllm": vllm.__version__,
            "arguments": self.arguments | {"attention_backend": self.backend, "model": self.model},
            "attention": sorted({type(layer.impl).__name__ for layer in layers}),
            "model_runner": type(core.model_executor.driver_worker.worker.model_runner).__module__,
            "block_size": config.cache_config.block_size,
            "blocks": config.cache_config.num_gpu_blocks,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "async_scheduling": config.scheduler_config.async_scheduling,
        }

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, **sampling: Any) -> list[Any]:
        """vLLM's outputs of greedy decoding."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling)
        return self.llm.generate([TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts], how, use_tqdm=False)

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """From the call to the last token."""
        _wait(self.device)
        started = time.perf_counter()
        self.generate(prompts, tokens)
        _wait(self.device)
        return time.perf_counter() - started


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def counted(device: str) -> Iterator[Callable[[], Told]]:
    """Count the past blocks that `prefill` reads inside, all layers together; steps that run dense do not call it."""
    run, counter = engine_steps.prefill, torch.zeros(2, dtype=torch.int64, device=device)

    def counting(*arguments: Any, **named: Any) -> Any:
        return run(*arguments, density=counter, **named)

    def told() -> Told:
        read, visible = counter.tolist()
        return {"read": read, "visible": visible}

    engine_steps.prefill = counting
    try:
        yield told
    finally:
        engine_steps.prefill = run


# ---- answers ----


def speak(engine: Engine, prompts: Sequence[Sequence[int]], shared: int) -> Told:
    """Greedy tokens: of all prompts but the last `shared` in one batch; of those one after the other, the first alone
    and the rest behind what it left in the prefix cache; and again, each with nothing in the cache.

    Of a selection the batch is asked once more, to count what it reads: counted steps are launched kernel by kernel,
    others are replayed, and both should say the same.

    Returns:
        "answers": in that order {"asked", "question", "tokens", "top2", "cached"}, `top2` being at every place [token,
        its log-probability, token, its log-probability]; "largest_logit"; "read": see `counted`, with the number of
        "prompts" and of "other" ones, which got other tokens.
    """
    scale = torch.zeros((), device=engine.device)
    engine.llm.apply_model(lambda model: _watch_logits(model, scale))
    first = len(prompts) - shared
    rounds = [("mixed", list(range(first)))]
    rounds += [(asked, [n]) for asked in ("cached", "cold") for n in range(first, len(prompts))]
    answers = []
    for asked, chosen in rounds:
        if asked != "cached" or chosen == [first]:
            engine.llm.reset_prefix_cache()
        outputs = _greedy(engine, [prompts[n] for n in chosen])
        answers += [{"asked": asked, "question": n, **_spoken(one)} for n, one in zip(chosen, outputs, strict=True)]
    told = {"answers": answers, "largest_logit": float(scale), "read": None}
    if engine.case.selects:
        engine.llm.reset_prefix_cache()
        with counted(engine.device) as read:
            again = [_spoken(output)["tokens"] for output in _greedy(engine, prompts[:first])]
            other = sum(ours["tokens"] != tokens for ours, tokens in zip(answers, again, strict=False))
            told["read"] = read() | {"prompts": first, "other": other}
    return told


def _greedy(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Any]:
    return engine.generate(prompts, engine.case.tokens, stop_token_ids=[END], logprobs=2)


def _watch_logits(model: torch.nn.Module, scale: torch.Tensor) -> None:
    """Keep the largest absolute logit in `scale`; logits are computed outside of CUDA graphs."""
    compute = model.compute_logits

    def watched(*arguments: Any, **named: Any) -> Any:
        logits = compute(*arguments, **named)
        torch.maximum(scale, logits.abs().amax().float(), out=scale)
        return logits

    model.compute_logits = watched


def _spoken(output: Any) -> Told:
    completion = output.outputs[0]
    best = [sorted(place.items(), key=lambda one: -one[1].logprob)[:2] for place in completion.logprobs]
    top2 = [[part for token, one in place for part in (token, round(one.logprob, 7))] for place in best]
    return {"tokens": list(completion.token_ids), "top2": top2, "cached": output.num_cached_tokens}


# ---- times ----


def time_prompts(engine: Engine) -> Told:
    """Seconds to the first token of prompts of random tokens, other ones each time, and of decode steps.

    A selection finds no pattern in random weights. It is timed on the two shortest lengths as it is, and on all with
    queries and keys scaled so that scores spread: by the factor that brings what is read nearest to `WANTED`. What was
    read is counted in further prompts, which nobody times.

    Returns:
        "checked": what the model as it is says to prompts that are the same in every engine; "decode"; "prompts"; of a
        selection "tried", the factors and densities.
    """
    case, random = engine.case, RandomPrompts(engine.llm.llm_engine.model_config.get_vocab_size())
    for length in sorted(case.lengths)[:2]:
        engine.generate([random.prompt(length)], 1)
    told: Told = {"checked": _checked(engine, random), "decode": _decode(engine, random)}
    if not case.selects:
        return told | {"prompts": [_timed(engine, random, length, 1.0) for length in case.lengths]}
    told["prompts"] = [_timed(engine, random, length, 1.0) for length in sorted(case.lengths)[:2]]
    told["tried"], factor = _scaled_to_density(engine, random, min(16384, max(case.lengths)))
    told["prompts"] += [_timed(engine, random, length, factor) for length in case.lengths]
    return told


def _checked(engine: Engine, random: RandomPrompts) -> list[Told]:
    """Tokens after prompts that depend on nothing but their length, one after the other."""
    found = []
    for length, count in CHECKED:
        own = RandomPrompts(random.vocabulary, seed=length)
        for _ in range(count if length in engine.case.lengths else 0):
            (output,) = engine.generate([own.prompt(length)], CHECKED_TOKENS, logprobs=2)
            found.append({"length": length, **_spoken(output)})
    return found


class RandomPrompts:
    """Prompts of random tokens, never the same twice, the same in every run."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self.vocabulary, self._numbers = vocabulary, np.random.default_rng(seed)

    def prompt(self, length: int) -> list[int]:
        return self._numbers.integers(0, self.vocabulary, length).tolist()


def _timed(engine: Engine, random: RandomPrompts, length: int, factor: float) -> Told:
    """Up to `REPEATS` times of one length after each other, and of a selection what it reads."""
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < PLENTY:
        seconds.append(engine.seconds([random.prompt(length)], 1))
    read = _read(engine, random, length) if engine.case.selects else None
    return {"length": length, "factor": factor, "seconds": seconds, "read": read}


def _read(engine: Engine, random: RandomPrompts, length: int) -> Told:
    with counted(engine.device) as read:
        engine.generate([random.prompt(length)], 1)
        return read()


def _decode(engine: Engine, random: RandomPrompts) -> Told:
    """Seconds of the engine's steps in which every request gets one token, each after a prompt of the shortest length.

    The first of them, which may still wait for the end of a prompt, is left out.
    """
    case, context = engine.case, min(engine.case.lengths)
    core, seconds = engine.llm.llm_engine, []
    scheduler, step = core.engine_core.engine_core.scheduler, core.step

    def timed() -> Any:
        running = scheduler.running
        decodes = [request.num_computed_tokens >= request.num_prompt_tokens for request in running]
        started = time.perf_counter()
        outputs = step()
        if sum(decodes) == case.requests == len(running):
            seconds.append(time.perf_counter() - started)
        return outputs

    core.step = timed
    try:
        engine.generate([random.prompt(context) for _ in range(case.requests)], case.tokens)
    finally:
        core.step = step
    return {"requests": case.requests, "context": context, "steps_s": seconds[1:]}


def _scaled_to_density(engine: Engine, random: RandomPrompts, length: int) -> tuple[list[Told], float]:
    """Scale queries and keys of every layer; the factors that were tried, and the one that stays.

    Scores grow with the square of the factor, and the density falls with it, though not to any value: a block that is
    the best of a single row stays.
    """

    def scale(to: float) -> float:
        engine.llm.apply_model(lambda model: _scale_queries_and_keys(model, to / now))
        return to

    low, high, most = SEARCH
    tried: list[Told] = []
    now = 1.0
    while len(tried) < most and distance_to_wanted(tried) > 0:
        now = scale((low * high) ** 0.5)
        read = _read(engine, random, length)
        tried.append({"factor": now, "density": read["read"] / max(1, read["visible"])})
        low, high = (now, high) if tried[-1]["density"] > WANTED[1] else (low, now)
    now = scale(min(tried, key=lambda one: distance_to_wanted([one]))["factor"])
    return tried, now


def distance_to_wanted(tried: Sequence[Told]) -> float:
    """How far the last density is from the wanted ones; infinite without any."""
    if not tried:
        return math.inf
    density = tried[-1]["density"]
    return max(WANTED[0] - density, density - WANTED[1], 0.0)


def _scale_queries_and_keys(model: torch.nn.Module, by: float) -> None:
    config = model.config
    rows = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if name.endswith("qkv_proj.weight"):
                weight[:rows].mul_(by)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
