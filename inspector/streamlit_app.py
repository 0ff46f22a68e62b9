"""See what a sparse prefill reads, what it misses, and what that costs: `streamlit run inspector`.

Pages and navigation only; `sidebar.py` asks, `model.py`, `recall.py` and `cost.py` compute, `charts.py`,
`quality_charts.py` and `figures.py` draw.
"""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

# Streamlit puts this folder on the path, not the checkout that it lies in; the script runs again at every click.
HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

PAGES = (
    ("data", "Data", ":material/database:"),
    ("masks", "Masks", ":material/grid_on:"),
    ("union", "Union", ":material/join_full:"),
    ("tables", "Tables", ":material/view_column:"),
    ("coverage", "Coverage against QUOKA", ":material/target:"),
    ("what_if", "What if", ":material/tune:"),
    ("compare", "Compare", ":material/compare_arrows:"),
)


def main() -> None:
    st.set_page_config(page_title="compactattn inspector", page_icon=":material/grid_view:", layout="wide")
    pages = [
        st.Page(HERE / "views" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "data")
        for name, title, icon in PAGES
    ]
    chosen = st.navigation(pages)
    from inspector import page, sidebar

    def leave_view() -> None:
        st.session_state[page.VIEW] = None
        st.session_state[page.VIEW] = sidebar.ask()

    page.guarded(leave_view)
    chosen.run()


main()
