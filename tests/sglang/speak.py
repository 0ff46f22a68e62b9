"""What SGLang's engine speaks under an attention backend: one engine, one line of JSON.

    python -m tests.sglang.speak job.json

A job holds `engine` (arguments of `sglang.Engine`), `turns` (lists of prompts, each a list of token ids, run one list
after the other), `tokens` (to speak after each prompt), and perhaps `reply` (a list of token ids: another turn asks
each request of the turn before again, with what it said and these) and `watch` (a file to which the processes of the
engine write what `tests.sglang.watching` has seen). All but the attention runs in plain PyTorch on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.sglang import native  # noqa: F401  SGLang's own processes import this module too, before they import sglang

if "COMPACTATTN_WATCH" in os.environ:
    from tests.sglang.watching import watch

    watch(os.environ["COMPACTATTN_WATCH"])


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    if "watch" in job:
        os.environ["COMPACTATTN_WATCH"] = job["watch"]  # for the engine's processes, which start below
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**job["engine"])
    sampling = {"temperature": 0, "max_new_tokens": job["tokens"], "ignore_eos": True}
    turns: list[list[dict[str, Any]]] = []
    for prompts in job["turns"]:
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
        turns.append([{"spoken": o["output_ids"], "cached": o["meta_info"]["cached_tokens"]} for o in outputs])
    if "reply" in job:
        last = zip(job["turns"][-1], turns[-1], strict=True)
        prompts = [[*prompt, *said["spoken"], *job["reply"]] for prompt, said in last]
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
        turns.append([{"spoken": o["output_ids"], "cached": o["meta_info"]["cached_tokens"]} for o in outputs])
    print(json.dumps(turns))
    sys.stdout.flush()
    engine.shutdown()


if __name__ == "__main__":
    main()
