//! From ConfigMaps, Secrets and the pod itself to the files of a volume. Pure.

use orch_api::k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret,
};

use crate::api;
use crate::pod::fields::{self, Place};
use crate::volume::atomic::{File, Payload};

/// Keys with their bytes.
pub(crate) type Entries = Vec<(String, Vec<u8>)>;

pub(crate) fn config_map_entries(map: &ConfigMap) -> Entries {
    let text =
        map.data.iter().flatten().map(|(key, value)| (key.clone(), value.clone().into_bytes()));
    let binary =
        map.binary_data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone()));
    text.chain(binary).collect()
}

pub(crate) fn secret_entries(secret: &Secret) -> Entries {
    secret.data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone())).collect()
}

/// All entries under their own names, or the chosen ones under the chosen paths.
///
/// # Errors
/// A chosen key is missing and not optional.
pub(crate) fn project(
    entries: &Entries,
    items: Option<&[KeyToPath]>,
    default_mode: u32,
    optional: bool,
    what: &str,
) -> Result<Payload, String> {
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        let all = entries
            .iter()
            .map(|(key, data)| (key.clone(), File { data: data.clone(), mode: default_mode }));
        return Ok(all.collect());
    };
    let mut payload = Payload::new();
    for item in items {
        match entries.iter().find(|(key, _)| *key == item.key) {
            Some((_, data)) => {
                payload.insert(
                    item.path.clone(),
                    File { data: data.clone(), mode: mode(item.mode, default_mode) },
                );
            }
            None if optional => {}
            None => return Err(format!("{what} references non-existent config key: {}", item.key)),
        }
    }
    Ok(payload)
}

/// Files of the downward API.
///
/// # Errors
/// A field or resource that is not offered.
pub(crate) fn downward(
    pod: &Pod,
    place: &Place,
    items: &[DownwardAPIVolumeFile],
    default_mode: u32,
) -> Result<Payload, String> {
    let mut payload = Payload::new();
    for item in items {
        let text = if let Some(wanted) = &item.field_ref {
            fields::field(pod, place, &wanted.field_path)
                .ok_or_else(|| format!("unsupported fieldPath: {}", wanted.field_path))?
        } else if let Some(wanted) = &item.resource_field_ref {
            let first = api::spec(pod).containers.into_iter().next().unwrap_or_default();
            fields::resource(pod, &first, place, wanted)?
        } else {
            continue;
        };
        payload.insert(
            item.path.clone(),
            File { data: text.into_bytes(), mode: mode(item.mode, default_mode) },
        );
    }
    Ok(payload)
}

pub(crate) fn mode(given: Option<i32>, default: u32) -> u32 {
    given.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(default) & 0o7777
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_keys_get_their_paths_and_modes() {
        let entries = vec![("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())];
        let item = KeyToPath { key: "b".to_owned(), path: "x/y".to_owned(), mode: Some(0o400) };
        let payload = project(&entries, Some(std::slice::from_ref(&item)), 0o644, false, "cm")
            .expect("files");
        assert_eq!(
            payload.into_iter().collect::<Vec<_>>(),
            [("x/y".to_owned(), File { data: b"2".to_vec(), mode: 0o400 })]
        );
        assert_eq!(project(&entries, None, 0o644, false, "cm").expect("files").len(), 2);
        let missing = KeyToPath { key: "no".to_owned(), ..item };
        assert!(
            project(&entries, Some(std::slice::from_ref(&missing)), 0o644, false, "cm").is_err()
        );
        assert!(project(&entries, Some(&[missing]), 0o644, true, "cm").is_ok());
    }
}
