"""The paper's tables, one file each: what is run, the table, the picture.

shakespeare          losses of language models on tiny Shakespeare
selective_copying    accuracy on a task that needs the input to decide what is kept
efficiency           time and memory of a training step and of a generated symbol, over length
results              what each leaves behind: JSON, Markdown, picture; and one page of them all

Everything is resumable: a training is a run folder, and what is done is not done again.
"""
