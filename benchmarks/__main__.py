"""All speed comparisons that take minutes (`make bench`)."""


def main() -> None:
    """Run the comparisons one after the other and print their results."""
    import torch

    from benchmarks import embed, loading, peers, probing, search, step

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio above 1: likewise is faster")
    for comparison in (loading, step, peers, embed, search, probing):
        for line in comparison.run():
            print(line, flush=True)


if __name__ == "__main__":
    main()
