//! Starts a nested host, brings programs into it and runs a command there.
//!
//! `cargo run -p ferry-guest-images --example nested -- PROGRAM… -- COMMAND ARGUMENT…`

use std::time::Duration;

use ferry_guest_images::nested::{Config, Nested};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut parts = arguments.split(|a| a == "--");
    let programs = parts
        .next()
        .unwrap_or_default()
        .iter()
        .map(Into::into)
        .collect();
    let config = Config {
        programs,
        ..Config::default()
    };
    let nested = Nested::start(&config, &|what| eprintln!("{what}"))?;
    eprintln!(
        "the nested host is up after {:.1} s",
        nested.took().as_secs_f64()
    );
    for command in parts {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let ran = nested.run(&command, Duration::from_secs(300))?;
        print!("{}{}", ran.stdout, ran.stderr);
        eprintln!("{command:?} ended with {}", ran.code);
    }
    Ok(())
}
