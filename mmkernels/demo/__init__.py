"""The demo: All-in-one on a real video, with and without the kernels (`mmkernels demo`)."""
