fn main() -> std::process::ExitCode {
    temper::cli::main()
}
