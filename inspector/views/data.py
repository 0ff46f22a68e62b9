"""Data: what was recorded or drawn, and where its heads look, before anything is selected."""

from __future__ import annotations

import streamlit as st

from inspector import cached, charts, frames, model, page
from inspector.page import Card
from inspector.recall import excerpt
from inspector.sidebar import View


def show(view: View) -> None:
    about, place, selector = view.about, view.place, view.setting.selector
    page.cards(
        Card("Prompt, tokens", f"{about.tokens:,}"),
        Card("Past of this chunk", f"{place.start:,}"),
        Card("Query heads / KV heads", f"{about.heads} / {about.kv_heads}"),
        Card("Head dimension", str(about.head_dim)),
        Card("Recorded layers", page.few(about.layers)),
    )
    st.caption(f"{page.plain(about.model)} · {page.plain(about.source)} · {about.dtype}")
    parts = about.tokens, place.stop - place.start, place.start
    prompt = frames.prompt_frame(*parts)
    strip = charts.prompt_chart(prompt, dark=view.dark)
    page.picture("prompt", strip, page.drawn("figures.prompt_figure", *parts), prompt)

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
    chart = charts.profile_chart(frame, dark=view.dark)
    page.picture("profile", chart, page.drawn("figures.profile_figure", profiles), frame)
    if mass.every > 1:
        st.caption(
            f"Exact softmax of every {mass.every}th query of each block; at this length all of them take too long."
        )
    if about.text is not None:
        with st.expander("The chunk's text", icon=":material/article:"):
            text = about.text[place.start : place.stop].decode("utf-8", "replace")
            st.code(text, language=None, height=260)
            st.caption(f"The first query in its surroundings: {page.plain(excerpt(about.text, place.start))}")
    page.python(view, "mass")


page.render(show)
