"""See what a sparse prefill reads, what it misses, and what that costs: `streamlit run inspector`.

Pages and navigation only. `sidebar.py` and `choices.py` ask; `sources.py` and `gates.py` read what was chosen;
`model.py`, `recall.py` and `cost.py` compute; `frames.py` and `quality_frames.py` make tables of it, which `charts.py`
and `quality_charts.py` draw for the page, `figures.py` and `quality_figures.py` for print.
"""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

# Streamlit puts this folder on the path, not the checkout that it lies in; the script runs again at every click.
HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

#: One page per question: file, title, icon, question.
PAGES = (
    (
        "data",
        "Data",
        ":material/database:",
        "What was recorded or drawn, and which part of the context do its heads attend to?",
    ),
    (
        "masks",
        "Masks",
        ":material/grid_on:",
        "Which blocks does each head's selector keep, and is that where its attention lies?",
    ),
    (
        "union",
        "Union",
        ":material/join_full:",
        "What does it cost that heads and query blocks share one list of blocks, and who causes it?",
    ),
    (
        "tables",
        "Tables",
        ":material/view_column:",
        "Which entries does the block table list, which pages does it read, and could any be spared?",
    ),
    (
        "coverage",
        "Coverage against QUOKA",
        ":material/target:",
        "How much of its exact attention does each query keep, and how does a token selection fare at the same budget?",
    ),
    (
        "what_if",
        "What if",
        ":material/tune:",
        "What would another threshold, selector or grouping buy, and what would it cost?",
    ),
    (
        "compare",
        "Compare",
        ":material/compare_arrows:",
        "How do two settings differ on the same chunk: in what they read, and in what they miss?",
    ),
)


def main() -> None:
    st.set_page_config(
        page_title="compactattn inspector", page_icon=str(HERE / "icon.svg"), layout="wide", initial_sidebar_state=320
    )
    st.html("<style>[data-testid=stMainBlockContainer] {padding-top: 2.6rem}</style>")
    pages = [
        st.Page(HERE / "views" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "data")
        for name, title, icon, _ in PAGES
    ]
    chosen = st.navigation(pages)
    st.title(chosen.title)
    st.markdown(next(question for _, title, _, question in PAGES if title == chosen.title))
    with st.spinner("Starting", show_time=False):  # the heading is there while PyTorch is imported
        from inspector import page, sidebar

    def leave_view() -> None:
        st.session_state[page.VIEW] = None
        st.session_state[page.VIEW] = sidebar.ask()

    page.guarded(leave_view)
    chosen.run()


if __name__ == "__main__":  # a reader's click
    main()
else:  # `streamlit run` starts its server from this
    from inspector import serving

    app = st.App(__file__, lifespan=serving.lifespan, on_script_error=serving.failed)
