"""Operations on CUDA devices: Triton kernels and what chooses among them."""
