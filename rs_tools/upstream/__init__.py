"""Other models behind the same tools: any OpenAI-compatible vision endpoint in place of our own wire.

`profiles` say how a family of models is asked and what it can, `reading` turns its words into the answers of our
protocol, `client` sends and receives. No torch.
"""
