//! `conditionsV4` and `conditionsV6`: further matches of a packet. Pure.
//!
//! The reference plugin hands them to its backend word by word, so they are written in the language of that backend, and
//! its usual one is iptables: `["!", "-d", "192.0.2.0/24"]`. Rules are nftables' here; the matches that stand in manuals
//! and examples are put into its words, and the others are an error that says so.

use cni_spec::{Error, IfName};
use ipnetwork::IpNetwork;

use crate::conf::{invalid, unsupported};

/// The condition in nftables' words. `family` is `ip` or `ip6`.
pub(crate) fn of_nft(key: &str, family: &str, words: &[String]) -> Result<String, Error> {
    let text = words.join(" ");
    // It becomes part of a line.
    if text.contains(['\n', '\r', ';', '#', '\0']) {
        return Err(invalid(format!("\"{key}\" is {text:?}, which is more than a match")));
    }
    // No expression of nftables begins with a dash.
    let iptables = words.iter().flat_map(|word| word.split(' ')).any(|word| word.starts_with('-'));
    if iptables { translate(key, family, &text) } else { Ok(text.trim().to_owned()) }
}

fn translate(key: &str, family: &str, text: &str) -> Result<String, Error> {
    let mut words = text.split_ascii_whitespace();
    let mut matches = Vec::new();
    while let Some(mut word) = words.next() {
        let mut operator = "";
        if word == "!" {
            operator = "!= ";
            word = words.next().unwrap_or_default();
        }
        let field = match word {
            "-s" | "--source" | "--src" => format!("{family} saddr"),
            "-d" | "--destination" | "--dst" => format!("{family} daddr"),
            "-i" | "--in-interface" => "iifname".to_owned(),
            _ => {
                return Err(unsupported(format!(
                    "\"{key}\" is {text:?}, and of iptables' matches this plugin knows -s, -d and -i, each with \"!\" \
                     before it; write the condition in the language of nft"
                )));
            }
        };
        let value = words.next().unwrap_or_default();
        let wrong =
            || invalid(format!("\"{key}\" is {text:?}, and {word} has the value {value:?}"));
        let value = if field == "iifname" {
            // At the end of a name iptables writes `+` for anything.
            let name: IfName = value.trim_end_matches('+').parse().map_err(|_| wrong())?;
            format!("\"{name}{}\"", if value.ends_with('+') { "*" } else { "" })
        } else {
            let nets: Result<Vec<IpNetwork>, _> = value.split(',').map(str::parse).collect();
            let nets = nets.map_err(|_| wrong())?;
            if nets.iter().any(|net| net.is_ipv4() != (family == "ip")) {
                return Err(wrong());
            }
            let texts: Vec<String> =
                nets.iter().map(|net| format!("{}/{}", net.network(), net.prefix())).collect();
            format!("{{ {} }}", texts.join(", "))
        };
        matches.push(format!("{field} {operator}{value}"));
    }
    Ok(matches.join(" "))
}

#[cfg(test)]
mod tests {
    use cni_spec::code;

    use super::*;

    fn condition(family: &str, words: &[&str]) -> Result<String, Error> {
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        of_nft("conditions", family, &words)
    }

    #[test]
    fn the_usual_matches_of_iptables_are_put_into_nftables_words() {
        for (family, words, want) in [
            ("ip", &["!", "-d", "192.0.2.0/24"][..], "ip daddr != { 192.0.2.0/24 }"),
            ("ip6", &["!", "-d", "fc00::/7"], "ip6 daddr != { fc00::/7 }"),
            ("ip", &["-s", "10.0.0.1,10.1.2.3/16"], "ip saddr { 10.0.0.1/32, 10.1.0.0/16 }"),
            (
                "ip",
                &["-i eth+ ! --source 10.0.0.0/8"],
                "iifname \"eth*\" ip saddr != { 10.0.0.0/8 }",
            ),
            ("ip", &["ip", "saddr", "198.51.100.0/24"], "ip saddr 198.51.100.0/24"),
            ("ip", &[], ""),
        ] {
            assert_eq!(condition(family, words).expect("good"), want);
        }
    }

    #[test]
    fn others_are_named() {
        for (words, code) in [
            (&["-m", "owner", "--uid-owner", "0"][..], code::UNSUPPORTED_FIELD),
            (&["-p", "tcp"], code::UNSUPPORTED_FIELD),
            (&["-d", "fc00::/7"], code::INVALID_CONFIG),
            (&["-d"], code::INVALID_CONFIG),
            (&["-s", "10.0.0.0/8\" accept"], code::INVALID_CONFIG),
            (&["-i", "a/b"], code::INVALID_CONFIG),
            (&["tcp", "dport 1\nflush ruleset"], code::INVALID_CONFIG),
        ] {
            let error = condition("ip", words).expect_err("refused");
            assert_eq!(error.code, code, "{error}");
            assert!(error.msg.contains("conditions"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn fuzz_conditions_never_become_two_lines(
            words in proptest::collection::vec("(.{0,20}|!|-d|-s|-i|[0-9./,]{0,20})", 0..5),
        ) {
            if let Ok(text) = of_nft("conditionsV4", "ip", &words) {
                proptest::prop_assert!(!text.contains(['\n', ';']));
            }
        }
    }
}
