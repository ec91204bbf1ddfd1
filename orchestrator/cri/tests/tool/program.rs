//! The program in the test image. Built static by the tests, so that it runs on an empty base.

use std::io::{Read as _, Write as _};
use std::time::Duration;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["cat"] => {
            let mut buffer = vec![0; 65536];
            loop {
                match std::io::stdin().read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(length) => std::io::stdout().write_all(&buffer[..length]).expect("written"),
                }
            }
        }
        ["exit", code] => std::process::exit(code.parse().expect("a code")),
        ["env", name] => println!("{}", std::env::var(name).unwrap_or_default()),
        ["read", path] => print!("{}", std::fs::read_to_string(path).expect("a file")),
        _ => {
            println!("to stdout");
            eprintln!("to stderr");
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        }
    }
}
