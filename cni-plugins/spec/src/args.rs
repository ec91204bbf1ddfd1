//! `CNI_ARGS`: `KEY=VALUE` pairs joined by `;`. Deprecated by the specification, used by every runtime.

use crate::{Error, code};

/// The pairs, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniArgs(Vec<(String, String)>);

impl CniArgs {
    /// Reads the variable; an empty one has no pairs.
    ///
    /// # Errors
    /// Code 4 if a part has no `=`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut pairs = Vec::new();
        for part in text.split(';').filter(|part| !part.trim().is_empty()) {
            match part.split_once('=') {
                Some((key, value)) if !key.is_empty() => {
                    pairs.push((key.to_owned(), value.to_owned()))
                }
                _ => {
                    let msg = format!("CNI_ARGS: {part:?} is not of the form KEY=VALUE");
                    return Err(Error::new(code::INVALID_ENVIRONMENT, msg));
                }
            }
        }
        Ok(Self(pairs))
    }

    /// All pairs, in order.
    #[must_use]
    pub fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    /// The value of a key; the last one counts.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// Refuses keys that the plugin does not know, unless the caller said `IgnoreUnknown=1`.
    ///
    /// # Errors
    /// Code 4 naming the keys.
    pub fn only(&self, known: &[&str]) -> Result<(), Error> {
        let ignore =
            self.get("IgnoreUnknown").is_some_and(|v| v == "1" || v.eq_ignore_ascii_case("true"));
        let unknown: Vec<&str> = self
            .0
            .iter()
            .map(|(key, _)| key.as_str())
            .filter(|key| *key != "IgnoreUnknown" && !known.contains(key))
            .collect();
        if ignore || unknown.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            code::INVALID_ENVIRONMENT,
            format!(
                "CNI_ARGS: unknown keys {} (IgnoreUnknown=1 lets them pass)",
                unknown.join(", ")
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_read_and_broken_ones_named() {
        let args = CniArgs::parse("IP=10.0.0.1;K8S_POD_NAME=a=b;IP=10.0.0.2;").expect("good");
        assert_eq!(args.get("IP"), Some("10.0.0.2"));
        assert_eq!(args.get("K8S_POD_NAME"), Some("a=b"));
        assert_eq!(args.get("MAC"), None);
        assert_eq!(CniArgs::parse("").expect("empty"), CniArgs::default());
        let error = CniArgs::parse("IP=1;nonsense").expect_err("no `=`");
        assert_eq!(error.code, code::INVALID_ENVIRONMENT);
        assert!(error.msg.contains("nonsense"));
    }

    #[test]
    fn unknown_keys_need_leave() {
        assert!(CniArgs::parse("X=1").expect("good").only(&["IP"]).is_err());
        CniArgs::parse("X=1;IgnoreUnknown=true").expect("good").only(&["IP"]).expect("leave given");
        CniArgs::parse("IP=1").expect("good").only(&["IP"]).expect("known");
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::mutate;

    /// What was read says the same again, and asking it never fails.
    fn read(text: &str) -> Result<(), TestCaseError> {
        let Ok(args) = CniArgs::parse(text) else { return Ok(()) };
        let again: Vec<String> =
            args.pairs().iter().map(|(key, value)| format!("{key}={value}")).collect();
        prop_assert_eq!(CniArgs::parse(&again.join(";")), Ok(args.clone()));
        for (key, _) in args.pairs() {
            prop_assert!(args.get(key).is_some());
        }
        let _ = args.only(&["IP", "MAC"]);
        Ok(())
    }

    proptest! {
        #[test]
        fn fuzz_cni_args_of_any_text_are_read_or_refused(text in ".{0,100}") {
            read(&text)?;
        }

        #[test]
        fn fuzz_the_corpus_of_cni_args_is_read_or_refused(text in mutate::bytes("args")) {
            read(&String::from_utf8_lossy(&text))?;
        }
    }
}
