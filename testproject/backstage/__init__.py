"""What demo.py and serve.py share: processes, a buyer who fills in forms, lines on the screen, and the proof."""
