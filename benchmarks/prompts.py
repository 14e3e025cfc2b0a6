"""Real text to sample from: nobody's in particular, of several kinds."""

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Question: What is the boiling point of water at sea level?\nAnswer:",
    "Ingredients: two eggs, a cup of flour, half a cup of milk and a pinch of salt. Method: First,",
    "The theory of evolution by natural selection was first formulated in Darwin's book, which",
    "Dear Sir or Madam,\n\nI am writing to apply for the position of",
    "In 1969, the crew of Apollo 11 landed on the Moon. Neil Armstrong became the first person to",
]
