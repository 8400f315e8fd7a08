"""A live board of cards beside the database's truth, and buttons that do real harm: `python -m examples.board`."""
