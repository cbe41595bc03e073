//! `/init`.

fn main() {
    ferry_linux_init::main();
}
