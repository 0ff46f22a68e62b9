"""Data: what was recorded or drawn, and where its heads look, before anything is selected."""

from __future__ import annotations

import streamlit as st

from inspector import cached, charts, frames, model, page, quality_charts
from inspector.recall import excerpt
from inspector.sidebar import View


def show(view: View) -> None:
    about, place, selector = view.about, view.place, view.setting.selector
    facts = st.columns(5)
    for column, (label, value) in zip(
        facts,
        (
            ("Prompt, tokens", f"{about.tokens:,}"),
            ("Past of this chunk", f"{place.start:,}"),
            ("Query heads / KV heads", f"{about.heads} / {about.kv_heads}"),
            ("Head dimension", str(about.head_dim)),
            ("Recorded layers", ", ".join(map(str, about.layers))),
        ),
        strict=True,
    ):
        column.metric(label, value, border=True, height="stretch")
    st.caption(f"{page.plain(about.model)} · {page.plain(about.source)} · {about.dtype}")
    page.chart(quality_charts.prompt_chart(about.tokens, place.stop - place.start, place.start, dark=view.dark))

    st.subheader("Where do the heads look?")
    mass = cached.mass(*view.at, selector.block_size, selector.query_block)
    profiles = model.profile(cached.step(*view.at), mass, selector)
    far = [profile.far for profile in profiles]
    st.markdown(
        f"Head {max(range(len(far)), key=far.__getitem__)} looks furthest back: {max(far):.1%} of its exact mass lies "
        f"in the past beyond sink and window. What lies there is what a selector has to find. "
        f"On average {sum(p.blocks_90 for p in profiles) / len(profiles):.1f} of "
        f"{mass.share.shape[2]:,} blocks of {selector.block_size} tokens hold 90 % of a query block's mass."
    )
    frame = frames.profile_frame(profiles)
    page.chart(charts.profile_chart(frame, dark=view.dark))
    note_sampling(mass.every)

    figure = page.drawn("profile_figure", profiles)
    page.downloads("profile", figure, lambda: frame)
    if about.text is not None:
        with st.expander("The chunk's text", icon=":material/article:"):
            text = about.text[place.start : place.stop].decode("utf-8", "replace")
            st.code(text, language=None, height=260)
            st.caption(f"The first query in its surroundings: {page.plain(excerpt(about.text, place.start))}")
    page.python(view)


def note_sampling(every: int) -> None:
    if every > 1:
        st.caption(f"Exact softmax of every {every}th query of each block; at this length all of them take too long.")


page.render(show)
