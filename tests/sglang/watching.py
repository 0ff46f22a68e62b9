"""Inside SGLang's processes: compare what a layer gives with what each request gets alone, and note what was seen.

Each line of the file is a word: "dense" and "sparse" runs that agreed, "retracted" requests, or how one differed.
"""

from __future__ import annotations

from compactattn import PagedKV, PrefillBatch, prefill
from compactattn.integrations.engine_steps import LayerPlan

EVERY = 11  # calls of a layer: all layers come up, none in every step


def watch(path: str) -> None:
    run, calls = LayerPlan.run, 0

    def note(word: str) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(word + "\n")

    def checked(self: LayerPlan, q, k, v, step, summary, out) -> None:  # type: ignore[no-untyped-def]
        nonlocal calls
        run(self, q, k, v, step, summary, out)
        calls += 1
        for planned in step.runs if calls % EVERY == 0 else ():
            starts, seq_lens = planned.batch.cu_seqlens_q.tolist(), planned.batch.seq_lens.tolist()
            for b, seq_len in enumerate(seq_lens):
                rows = slice(planned.rows.start + starts[b], planned.rows.start + starts[b + 1])
                kv = PagedKV(k, v, planned.page_table[b : b + 1])
                batch = PrefillBatch.from_lens([rows.stop - rows.start], [seq_len])
                grouping = {"heads_per_group": 1, "query_blocks_per_span": 1}
                alone = prefill(q[rows], kv, batch, selector=self.selector, scale=self.scale, **grouping)
                difference = float((out[rows] - alone).abs().max())  # type: ignore[operator]
                if not difference <= 2e-5:
                    note(f"a {'dense' if planned.run.dense else 'sparse'} run differs by {difference}")
                note("dense" if planned.run.dense else "sparse")

    LayerPlan.run = checked  # type: ignore[method-assign]

    from sglang.srt.managers.schedule_batch import ScheduleBatch

    retract = ScheduleBatch.retract_decode

    def counted(self, *arguments, **named):  # type: ignore[no-untyped-def]
        note("retracted")
        return retract(self, *arguments, **named)

    ScheduleBatch.retract_decode = counted
