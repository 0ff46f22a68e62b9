"""A look into one chunk of a recorded prompt, in the browser: `streamlit run inspector`."""
