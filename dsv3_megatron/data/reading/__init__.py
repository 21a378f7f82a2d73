"""Makes texts of files: which files, their bytes, their lines and rows, the blocks in which a job takes them.

    inputs.py      patterns -> files with a format; a job's shards  byte_streams.py  bytes: decompression, whole lines
    folders.py     what lies in a folder, links followed            file_content.py  what a file holds, by its beginning
    json_lines.py  a JSON line -> texts, and all that can be wrong  blocks.py        a job's input in pieces of work
    documents.py   blocks -> documents; plain iteration; samples
"""
