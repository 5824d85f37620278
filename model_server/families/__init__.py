"""Published models behind our tools: each family asks with the words, pictures and text formats it was trained on.

A family is a dialect (what is asked, and how the answer is read) over a speaker (the loaded network with its
tokenizer and image processing). `loading.load` opens a folder.
"""
