"""`make bench`: all comparisons that take minutes."""


def main() -> None:
    """Run the comparisons one after the other and print a line each."""
    import torch

    from benchmarks import probing, search, step

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; a ratio above 1: ours is faster")
    for line in [*search.run(), *step.run(), *probing.run()]:
        print(line)


if __name__ == "__main__":
    main()
