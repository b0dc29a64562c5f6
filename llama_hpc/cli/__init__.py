"""The command line: main.py holds the frame, every command has a file of its own."""
