"""The peers: every way to run one width of a nested ViT that a user would choose, and ours.

``bench.measuring.peer`` says what a peer is, ``registry`` lists all. Peers share nothing but the model's full
parameters.
"""
