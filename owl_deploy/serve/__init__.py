"""An exported artifact behind an OpenAI-compatible HTTP server, on a CPU and without torch.

`server.serve` opens everything and runs until it is told to stop. Inside, from the model outwards: `batch` runs the
graph for several sequences at once, `sampling` chooses tokens, `text_stream` makes text of them, `scheduler` decides
whose turn it is, `routes` speaks HTTP. Each knows only those before it.
"""
