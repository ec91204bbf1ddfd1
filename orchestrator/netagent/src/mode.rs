//! Whether the agent does what not every kernel can.

use std::fmt;
use std::str::FromStr;

/// Of one thing that the agent can do in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// It does not; what an earlier run put into the kernel is taken out.
    #[default]
    Off,
    /// It does where the kernel can.
    Auto,
    /// It does, and it is a problem if the kernel cannot.
    On,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Off, Self::Auto, Self::On];
    const WORDS: [&str; 3] = ["off", "auto", "on"];

    /// As most flags have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        Self::WORDS[self as usize]
    }

    /// Reads a flag that has words of its own, in the order of [`Mode::ALL`].
    ///
    /// # Errors
    /// Names the words.
    pub fn parse(text: &str, words: [&str; 3]) -> Result<Self, String> {
        let place = words.iter().position(|word| *word == text);
        place
            .map(|place| Self::ALL[place])
            .ok_or_else(|| format!("{text:?} is none of {}", words.join(", ")))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text, Self::WORDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_read_back_by_the_words_of_each_flag() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!(Mode::parse("ebpf", ["nftables", "auto", "ebpf"]), Ok(Mode::On));
        let error = Mode::parse("on", ["nftables", "auto", "ebpf"]).expect_err("another flag's");
        assert_eq!(error, "\"on\" is none of nftables, auto, ebpf");
    }
}
