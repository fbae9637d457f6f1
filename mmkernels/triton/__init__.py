"""GPU kernels in Triton, one file a family. Imported on first use: Triton is not needed where they do not run."""
