"""The board in a real Chromium, struck by every fault: `python -m tests.board`, and tests/test_board.py in short."""
