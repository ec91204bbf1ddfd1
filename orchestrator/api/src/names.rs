//! Names: what may be one, and made-up ones (apimachinery, `util/validation`).

use rand::Rng as _;

const LABEL_MAX: usize = 63;
const SUBDOMAIN_MAX: usize = 253;
/// Letters of generated suffixes: no vowels, so no words; no digits that look like letters.
const SUFFIX_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LEN: usize = 5;

fn lower_alphanumeric(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

/// RFC 1123 label: at most 63 of `[a-z0-9-]`, alphanumeric at both ends.
///
/// # Errors
/// What a name must look like, in upstream's words.
pub fn is_dns1123_label(name: &str) -> Result<(), String> {
    if name.len() > LABEL_MAX {
        return Err(format!("must be no more than {LABEL_MAX} characters"));
    }
    let bytes = name.as_bytes();
    let ends = bytes.first().is_some_and(|b| lower_alphanumeric(*b))
        && bytes.last().is_some_and(|b| lower_alphanumeric(*b));
    if ends && bytes.iter().all(|b| lower_alphanumeric(*b) || *b == b'-') {
        return Ok(());
    }
    Err("a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')".to_owned())
}

/// RFC 1123 subdomain: labels joined by dots, at most 253 characters.
///
/// # Errors
/// As [`is_dns1123_label`].
pub fn is_dns1123_subdomain(name: &str) -> Result<(), String> {
    if name.len() > SUBDOMAIN_MAX {
        return Err(format!("must be no more than {SUBDOMAIN_MAX} characters"));
    }
    let label = |part: &str| {
        let bytes = part.as_bytes();
        bytes.first().is_some_and(|b| lower_alphanumeric(*b))
            && bytes.last().is_some_and(|b| lower_alphanumeric(*b))
            && bytes.iter().all(|b| lower_alphanumeric(*b) || *b == b'-')
    };
    if name.split('.').all(label) {
        return Ok(());
    }
    Err("a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')".to_owned())
}

/// RFC 1035 label: as RFC 1123 but starting with a letter (Service names).
///
/// # Errors
/// As [`is_dns1123_label`].
pub fn is_dns1035_label(name: &str) -> Result<(), String> {
    if is_dns1123_label(name).is_ok() && name.as_bytes()[0].is_ascii_lowercase() {
        return Ok(());
    }
    if name.len() > LABEL_MAX {
        return Err(format!("must be no more than {LABEL_MAX} characters"));
    }
    Err("a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')".to_owned())
}

/// A segment of a URL path: all that names of RBAC objects have to be, so that `system:node` is one.
///
/// # Errors
/// As [`is_dns1123_label`].
pub fn is_path_segment(name: &str) -> Result<(), String> {
    if matches!(name, "." | "..") {
        return Err(format!("may not be '{name}'"));
    }
    match name.chars().find(|letter| matches!(letter, '/' | '%')) {
        Some(letter) => Err(format!("may not contain '{letter}'")),
        None => Ok(()),
    }
}

fn is_name_part(part: &str) -> bool {
    let bytes = part.as_bytes();
    part.len() <= LABEL_MAX
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

/// Key of a label or annotation: an optional DNS prefix, a slash, a name.
///
/// # Errors
/// As [`is_dns1123_label`].
pub fn is_qualified_name(key: &str) -> Result<(), String> {
    let (prefix, name) =
        key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if let Some(prefix) = prefix {
        is_dns1123_subdomain(prefix).map_err(|why| format!("prefix part {why}"))?;
    }
    if is_name_part(name) {
        return Ok(());
    }
    Err("name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')".to_owned())
}

/// Value of a label: empty or a name part.
///
/// # Errors
/// As [`is_dns1123_label`].
pub fn is_label_value(value: &str) -> Result<(), String> {
    if value.len() > LABEL_MAX {
        return Err(format!("must be no more than {LABEL_MAX} characters"));
    }
    if value.is_empty() || is_name_part(value) {
        return Ok(());
    }
    Err("a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')".to_owned())
}

/// A name made of `base` and five random letters, at most 63 characters.
#[must_use]
pub fn generate_name(base: &str) -> String {
    let mut name: String = base.chars().take(LABEL_MAX - SUFFIX_LEN).collect();
    let mut random = rand::rng();
    for _ in 0..SUFFIX_LEN {
        name.push(char::from(SUFFIX_LETTERS[random.random_range(0..SUFFIX_LETTERS.len())]));
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_by_table() {
        for good in ["a", "web-0", "1a"] {
            assert!(is_dns1123_label(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", &"x".repeat(64)] {
            assert!(is_dns1123_label(bad).is_err(), "{bad}");
        }
        assert!(is_dns1123_subdomain("a.b-c.d").is_ok() && is_dns1123_subdomain("a..b").is_err());
        assert!(
            is_dns1035_label("1a").is_err()
                && is_dns1035_label("").is_err()
                && is_dns1035_label("a1").is_ok()
        );
        assert!(
            is_qualified_name("app.kubernetes.io/name").is_ok()
                && is_qualified_name("/name").is_err()
        );
        assert!(is_label_value("").is_ok() && is_label_value("a b").is_err());
    }

    #[test]
    fn generated_names_fit_and_differ() {
        let long = generate_name(&"x".repeat(100));
        assert_eq!(long.len(), 63);
        assert_ne!(generate_name("web-"), generate_name("web-"));
    }
}
