"""The command line, one file a command: `add` its options, `run` it. They stand on top of everything and stay thin.

What a command needs is imported when it runs, so that --help is quick.
"""
