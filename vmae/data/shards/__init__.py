"""Videos in tar files, read by byte range: an index says where each stands and what sampling needs to know.

A shard is a plain tar file that WebDataset's readers read too. For each sample its members stand together:

    KEY.json                      class, source, frames, frames a second, size
    KEY.packets                   where each picture stands in the video (see `packets`); packed H.264 only
    KEY.mp4                       the video; of a folder of frames KEY.img_00001.jpg, KEY.img_00002.jpg, ...

A sample stays a function of (seed, epoch, index): the index gives any clip without reading what stands before
it, where readers of tar streams shuffle a buffer.
"""
